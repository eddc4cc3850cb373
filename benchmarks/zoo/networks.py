"""The networks: the smallest member of each family, random weights, small example inputs.

Nothing is downloaded. Images are 64 x 64 where a network takes them, sequences have 32 tokens,
batches two samples; transformers are built from configurations of three narrow layers.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from .configurations import CONFIGURATIONS

__all__ = ["NAMES", "build", "jumps"]

_TORCHVISION = [
    "alexnet", "convnext_tiny", "deeplabv3_resnet50", "densenet121", "efficientnet_b0",
    "efficientnet_v2_s", "fasterrcnn_resnet50_fpn", "fcn_resnet50", "fcos_resnet50_fpn",
    "googlenet", "inception_v3", "lraspp_mobilenet_v3_large", "maskrcnn_resnet50_fpn",
    "maxvit_t", "mc3_18", "mnasnet1_0", "mobilenet_v2", "mobilenet_v3_small", "r2plus1d_18",
    "r3d_18", "raft_small", "regnet_x_400mf", "regnet_y_400mf", "resnet101", "resnet18",
    "resnet34", "resnet50", "resnext50_32x4d", "retinanet_resnet50_fpn", "shufflenet_v2_x1_0",
    "squeezenet1_0", "squeezenet1_1", "ssd300_vgg16", "ssdlite320_mobilenet_v3_large",
    "swin3d_t", "swin_t", "swin_v2_t", "vgg11_bn", "vgg16", "vit_b_16", "wide_resnet50_2",
]  # fmt: skip
_TIMM = [
    "beit_base_patch16_224", "botnet26t_256", "cait_xxs24_224", "coat_tiny", "convit_tiny",
    "convmixer_768_32", "convnext_tiny", "convnextv2_atto", "crossvit_tiny_240", "cspresnet50",
    "deit_tiny_patch16_224", "dla34", "edgenext_xx_small", "efficientformer_l1",
    "efficientnet_b0", "efficientvit_b0", "ese_vovnet19b_dw", "fastvit_t8", "gernet_s",
    "ghostnet_100", "gmlp_s16_224", "hiera_tiny_224", "hrnet_w18_small", "inception_next_atto",
    "levit_128s", "mambaout_femto", "mixer_s32_224", "mobilenetv3_large_100", "mobileone_s0",
    "mobilevit_xxs", "nfnet_l0", "pit_ti_224", "poolformer_s12", "pvt_v2_b0", "regnetx_002",
    "repvgg_a0", "repvit_m1", "res2net50_26w_4s", "resmlp_12_224", "resnet50",
    "resnext50_32x4d", "sequencer2d_s", "seresnet50", "starnet_s1",
    "swin_tiny_patch4_window7_224", "tinynet_e", "twins_svt_small", "vit_tiny_patch16_224",
    "xcit_nano_12_p16_224",
]  # fmt: skip

NAMES = (
    *(f"transformers/{name}" for name in CONFIGURATIONS),
    *(f"timm/{name}" for name in _TIMM),
    *(f"torchvision/{name}" for name in _TORCHVISION),
)
"""Library and name of every network."""


_DETECTORS = ("rcnn", "retinanet", "fcos", "ssd")


def jumps(name: str) -> bool:
    """Whether a network's outputs are boxes that survive others."""
    return any(kind in name for kind in _DETECTORS)


def build(name: str) -> tuple[nn.Module, Any]:
    """The network, in evaluation mode, with seeded random weights, and example inputs."""
    torch.manual_seed(0)
    library, _, member = name.partition("/")
    builders = {"torchvision": _torchvision, "timm": _timm, "transformers": _transformers}
    model, inputs = builders[library](member)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # Gains and shifts that are all one or zero hide faults, as do heads.
        for parameter in model.parameters():
            if parameter.is_floating_point() and (parameter.ndim < 2 or not parameter.any()):
                parameter.add_(0.1 * torch.rand(parameter.shape, generator=generator))
    return model.eval(), inputs


def _images(size: int = 64) -> tuple[Tensor]:
    return (torch.randn(2, 3, size, size),)


def _torchvision(name: str) -> tuple[nn.Module, Any]:
    models = importlib.import_module("torchvision.models")
    if name == "maxvit_t":
        options = {"stem_channels": 64, "block_channels": [64, 128, 256, 512]}
        options |= {"block_layers": [2, 2, 5, 2], "head_dim": 32, "stochastic_depth_prob": 0.2}
        return models.maxvit.MaxVit(**options, partition_size=2, input_size=(64, 64)), _images()
    dense = (*_DETECTORS, "fcn", "deeplab", "lraspp")
    known: dict[str, Any] = {"vit_b_16": {"image_size": 64}}
    known |= {key: {"init_weights": False} for key in ("googlenet", "inception_v3")}
    without: dict[str, Any] = {"weights_backbone": None} if any(d in name for d in dense) else {}
    model = models.get_model(name, weights=None, **known.get(name, without))
    if jumps(name):
        size = 320 if "ssd" in name else 128
        if "ssd" not in name:
            model.transform.min_size, model.transform.max_size = (size,), size
        return model, ([torch.rand(3, size, size), torch.rand(3, size, size)],)
    if name == "raft_small":
        return model, (torch.rand(2, 3, 128, 128), torch.rand(2, 3, 128, 128))
    if any(kind in name for kind in ("3d", "mc3", "2plus1")):
        return model, (torch.randn(2, 3, 16, 64, 64),)
    return model, _images(299 if name == "inception_v3" else 64)


def _timm(name: str) -> tuple[nn.Module, Any]:
    timm = importlib.import_module("timm")
    options: dict[str, Any] = {}
    size = 64
    sized = ("vit_", "deit", "beit", "xcit", "mixer", "resmlp", "gmlp", "cait", "convit", "coat")
    if any(name.startswith(kind) for kind in (*sized, "pit_")):
        options = {"img_size": 64}
    if name.startswith("swin"):
        options, size = {"img_size": 112}, 112
    if any(
        name.startswith(kind)
        for kind in ("levit", "efficientformer", "twins", "sequencer", "hiera")
    ):
        size = 224
    if name.startswith("crossvit"):
        size = 240
    if name.startswith("botnet"):
        size = 256
    return timm.create_model(name, pretrained=False, **options), _images(size)


def _transformers(name: str) -> tuple[nn.Module, Any]:
    library = importlib.import_module("transformers")
    model, config, options, kind = CONFIGURATIONS[name]
    made = getattr(library, model)(getattr(library, config)(**options))
    ids = torch.randint(5, 99, (2, 32))
    inputs: dict[str, dict[str, Tensor]] = {
        "text": {"input_ids": ids},
        "pair": {"input_ids": ids, "decoder_input_ids": ids},
        "image": {"pixel_values": torch.randn(2, 3, 64, 64)},
        "waves": {"input_values": torch.randn(2, 4000)},
        "mel": {"spectrogram": torch.randn(2, 8, 16)},
        "series": {"past_values": torch.randn(2, 32, 3)},
        "spectrum": {"input_features": torch.randn(2, 16, 64), "decoder_input_ids": ids},
    }
    return made, inputs[kind]
