"""Members of transformers: three narrow layers each, from configurations alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["CONFIGURATIONS"]

_TEXT: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 128, "max_position_embeddings": 64,
}  # fmt: skip
_DECODER: dict[str, Any] = {**_TEXT, "use_cache": False}
_GROUPED: dict[str, Any] = {**_DECODER, "num_key_value_heads": 2}
_IMAGE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "image_size": 64, "patch_size": 16,
}  # fmt: skip
_GPT: dict[str, Any] = {
    "vocab_size": 99, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64,
    "use_cache": False,
}  # fmt: skip
_PAIR: dict[str, Any] = {
    "vocab_size": 99, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128, "max_position_embeddings": 64, "use_cache": False,
}  # fmt: skip
_WAVES: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 128, "conv_dim": (32, 32, 32), "conv_stride": (5, 2, 2),
    "conv_kernel": (10, 3, 3), "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}  # fmt: skip

CONFIGURATIONS: dict[str, tuple[str, str, Mapping[str, Any], str]] = {
    "albert_cls": (
        "AlbertForSequenceClassification",
        "AlbertConfig",
        {**_TEXT, "embedding_size": 32},
        "text",
    ),
    "bart": ("BartForConditionalGeneration", "BartConfig", _PAIR, "pair"),
    "bert_cls": ("BertForSequenceClassification", "BertConfig", _TEXT, "text"),
    "bert_mlm": ("BertForMaskedLM", "BertConfig", _TEXT, "text"),
    "bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": 99, "hidden_size": 64, "n_layer": 3, "n_head": 4, "use_cache": False},
        "text",
    ),
    "clip_vision": (
        "CLIPVisionModelWithProjection",
        "CLIPVisionConfig",
        {**_IMAGE, "projection_dim": 32},
        "image",
    ),
    "codegen": (
        "CodeGenForCausalLM",
        "CodeGenConfig",
        {**_GPT, "rotary_dim": 8, "n_ctx": 64},
        "text",
    ),
    "cohere": (
        "CohereForCausalLM",
        "CohereConfig",
        {**_DECODER, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2},
        "text",
    ),
    "convnext": (
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"hidden_sizes": [32, 64], "depths": [2, 2], "num_stages": 2},
        "image",
    ),
    "deberta_v2": ("DebertaV2ForSequenceClassification", "DebertaV2Config", _TEXT, "text"),
    "deit": ("DeiTForImageClassification", "DeiTConfig", _IMAGE, "image"),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", {**_IMAGE, "mlp_ratio": 2}, "image"),
    "distilbert_cls": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {
            "vocab_size": 99,
            "dim": 64,
            "hidden_dim": 128,
            "n_layers": 3,
            "n_heads": 4,
            "max_position_embeddings": 64,
        },
        "text",
    ),
    "electra_cls": (
        "ElectraForSequenceClassification",
        "ElectraConfig",
        {**_TEXT, "embedding_size": 32},
        "text",
    ),
    "falcon": ("FalconForCausalLM", "FalconConfig", _DECODER, "text"),
    "falcon_new": (
        "FalconForCausalLM",
        "FalconConfig",
        {**_DECODER, "num_kv_heads": 2, "new_decoder_architecture": True},
        "text",
    ),
    "gemma": (
        "GemmaForCausalLM",
        "GemmaConfig",
        {**_DECODER, "head_dim": 16, "num_key_value_heads": 1},
        "text",
    ),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**_GROUPED, "head_dim": 16}, "text"),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**_GROUPED, "head_dim": 16}, "text"),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT, "text"),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {
            "vocab_size": 99,
            "hidden_size": 64,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 64,
            "use_cache": False,
        },
        "text",
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _DECODER, "text"),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", {**_GPT, "rotary_dim": 8}, "text"),
    "granite": ("GraniteForCausalLM", "GraniteConfig", _GROUPED, "text"),
    "hubert": ("HubertForSequenceClassification", "HubertConfig", _WAVES, "waves"),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _DECODER, "text"),
    "mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        {
            "vocab_size": 99,
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "state_size": 8,
            "use_cache": False,
        },
        "text",
    ),
    "mistral_gqa": ("MistralForCausalLM", "MistralConfig", _GROUPED, "text"),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {**_GROUPED, "num_local_experts": 4},
        "text",
    ),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", _DECODER, "text"),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {
            "vocab_size": 99,
            "hidden_size": 64,
            "ffn_dim": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 64,
            "use_cache": False,
        },
        "text",
    ),
    "pegasus": ("PegasusForConditionalGeneration", "PegasusConfig", _PAIR, "pair"),
    "phi": ("PhiForCausalLM", "PhiConfig", _DECODER, "text"),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {**_DECODER, "pad_token_id": 0}, "text"),
    "qwen2_gqa": ("Qwen2ForCausalLM", "Qwen2Config", _GROUPED, "text"),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**_GROUPED, "head_dim": 16}, "text"),
    "roberta_cls": ("RobertaForSequenceClassification", "RobertaConfig", _TEXT, "text"),
    "segformer": (
        "SegformerForImageClassification",
        "SegformerConfig",
        {
            "hidden_sizes": [32, 64, 64, 64],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 4, 4],
        },
        "image",
    ),
    "siglip_vision": ("SiglipVisionModel", "SiglipVisionConfig", _IMAGE, "image"),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", _GROUPED, "text"),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", _GROUPED, "text"),
    "swin": (
        "SwinForImageClassification",
        "SwinConfig",
        {
            "image_size": 64,
            "patch_size": 4,
            "embed_dim": 32,
            "depths": [2, 2],
            "num_heads": [2, 4],
            "window_size": 4,
        },
        "image",
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": 99,
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 128,
            "num_layers": 2,
            "num_heads": 4,
            "use_cache": False,
        },
        "pair",
    ),
    "vit": ("ViTForImageClassification", "ViTConfig", _IMAGE, "image"),
    "wav2vec2": ("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", _WAVES, "waves"),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            **{k: v for k, v in _PAIR.items() if k != "max_position_embeddings"},
            "num_mel_bins": 16,
            "max_source_positions": 32,
            "max_target_positions": 64,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
        "spectrum",
    ),
    "xlm_roberta": ("XLMRobertaForSequenceClassification", "XLMRobertaConfig", _TEXT, "text"),
}
"""By name: class of the model and of its configuration, options of that, kind of inputs."""
