"""``nn.MultiheadAttention`` in a form that can lose heads.

Its own forward pass hands weights straight to a fused function: the output projection is never
called, so nothing can be masked or measured at its input, and the head size is worked out from the
embedding, so that a head less would make the others wider. :class:`HeadwiseAttention` has the
same parameters under the same names and computes the same step by step. A module is patched with
that class while it is masked or measured, and stays in it once heads are gone.
"""

# No postponed annotations: torch.jit.script reads them as they are.
import torch
from torch import Tensor, nn
from torch.nn import functional

NATIVE = nn.MultiheadAttention


class HeadwiseAttention(nn.MultiheadAttention):
    """The same attention, computed head by head from the sizes of its tensors."""

    # Not for torch.jit.script, which asks for neither.
    __jit_unused_properties__ = ("_qkv_same_embed_dim",)

    @property
    def _qkv_same_embed_dim(self) -> bool:
        # Transformer layers ask this before they bypass ``forward`` by a fused kernel.
        return False

    @_qkv_same_embed_dim.setter
    def _qkv_same_embed_dim(self, value: bool) -> None:
        pass

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention.forward``."""
        if query.is_nested:
            return self._of_ragged(query), None
        batched = query.dim() == 3
        streams = [query, key, value]
        if not batched:
            streams = [x.unsqueeze(0) for x in streams]
        elif not self.batch_first:
            streams = [x.transpose(0, 1) for x in streams]
        parts = [self._split(x) for x in self._project(streams)]
        q, k, v = parts[0], parts[1], parts[2]
        scores = torch.matmul(q, k.transpose(-1, -2)) * self.head_dim**-0.5
        if attn_mask is None and key_padding_mask is None:
            weights = functional.softmax(scores, dim=-1)
        else:
            weights = _safe_softmax(self._masked(scores, key_padding_mask, attn_mask))
        mixed = torch.matmul(functional.dropout(weights, self.dropout, self.training), v)
        output = self.out_proj(mixed.transpose(1, 2).flatten(2))
        shown: Tensor | None = None
        if need_weights:
            shown = weights.mean(1) if average_attn_weights else weights
        if not batched:
            return output.squeeze(0), None if shown is None else shown.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1), shown

    @torch.jit.unused
    def _of_ragged(self, x: Tensor) -> Tensor:
        """Self-attention of sequences without padding, as ``nn.TransformerEncoder`` packs them
        where no gradient is wanted: it looks at its first layer only before it does."""
        padded, lengths = x.to_padded_tensor(0.0), [len(row) for row in x.unbind()]
        places = torch.arange(padded.shape[1], device=padded.device)
        padding = places >= torch.tensor(lengths, device=padded.device)[:, None]
        output, _ = self.forward(padded, padded, padded, padding, need_weights=False)
        rows = [row[:length] for row, length in zip(output, lengths, strict=True)]
        return torch.nested.as_nested_tensor(rows)

    def _project(self, streams: list[Tensor]) -> list[Tensor]:
        """[B, T, heads * head_dim] of queries, keys and values."""
        if self.in_proj_weight is not None:
            weights = list(self.in_proj_weight.chunk(3))
        else:
            weights = [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight]
        made = [functional.linear(x, weights[i]) for i, x in enumerate(streams)]
        if self.in_proj_bias is None:
            return made
        biases = list(self.in_proj_bias.chunk(3))
        return [x + biases[i] for i, x in enumerate(made)]

    def _split(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], x.shape[1], -1, self.head_dim).transpose(1, 2)

    def _masked(self, scores: Tensor, padding: Tensor | None, mask: Tensor | None) -> Tensor:
        """[B, H, T, S] with what must not be seen at minus infinity."""
        if mask is not None:
            # One mask for each sample and head comes as [B * H, T, S], for all of them as [T, S].
            shaped = mask.view(scores.shape) if mask.dim() == 3 else mask
            scores = _hidden(scores, shaped)
        if padding is not None:
            scores = _hidden(scores, padding.view(scores.shape[0], 1, 1, -1))
        return scores


def _hidden(scores: Tensor, mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return scores.masked_fill(mask, float("-inf"))
    return scores + mask


def _safe_softmax(scores: Tensor) -> Tensor:
    """The softmax over the last axis; zeros, and no gradient, where a row may see nothing."""
    blind = scores.amax(-1, keepdim=True) == float("-inf")
    return functional.softmax(scores.masked_fill(blind, 0.0), dim=-1).masked_fill(blind, 0.0)


def native_projections(module: nn.MultiheadAttention) -> dict[str, tuple[int, ...]]:
    """Parameters that make queries, keys and values, and where the blocks of heads begin in
    each; none where extra key tokens are added (their biases have no place in a head)."""
    if module.bias_k is not None or module.bias_v is not None or module.add_zero_attn:
        return {}
    inner = module.num_heads * module.head_dim
    packed = (0, inner, 2 * inner)
    found: dict[str, tuple[int, ...]] = {}
    if module.in_proj_weight is not None:
        found["in_proj_weight"] = packed
    else:
        found |= {f"{part}_proj_weight": (0,) for part in ("q", "k", "v")}
    if module.in_proj_bias is not None:
        found["in_proj_bias"] = packed
    return found


def is_packed(module: nn.MultiheadAttention) -> bool:
    """Whether one weight makes queries, keys and values, from inputs of one width, and nothing is
    added to the keys."""
    return module.in_proj_weight is not None and bool(native_projections(module))


def commit(module: nn.Module) -> None:
    """Set an attention's size attributes and class to what its tensors' shapes say."""
    if isinstance(module, NATIVE) and type(module) in (NATIVE, HeadwiseAttention):
        made, inner = module.out_proj.weight.shape
        if module.in_proj_weight is not None:
            module.embed_dim = module.kdim = module.vdim = made
        module.num_heads = inner // module.head_dim
        module.out_proj.in_features = inner
        module.__class__ = NATIVE if inner == module.embed_dim else HeadwiseAttention


class Patched:
    """A plain attention is of the headwise class until this is removed, and stays so if it has lost
    heads meanwhile."""

    def __init__(self, module: nn.MultiheadAttention) -> None:
        self._module = module
        module.__class__ = HeadwiseAttention

    def remove(self) -> None:
        """Make it what its tensors' shapes say."""
        commit(self._module)
