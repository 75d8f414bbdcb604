"""The zoo of backbones, one class each, and the one table that names them. `base` is the template for a new one."""

from __future__ import annotations

from llm4msr.config import ModelConfig
from llm4msr.models.backbones.adaptdhm import AdaptDHM
from llm4msr.models.backbones.adasparse import AdaSparse
from llm4msr.models.backbones.aitm import AITM
from llm4msr.models.backbones.base import Backbone, InputLayout
from llm4msr.models.backbones.controls import MLP, DCNv2, DeepFM
from llm4msr.models.backbones.hamur import HAMUR
from llm4msr.models.backbones.hinet import HiNet
from llm4msr.models.backbones.m2m import M2M
from llm4msr.models.backbones.m3oe import M3oE
from llm4msr.models.backbones.moe import MMoE, OMoE
from llm4msr.models.backbones.pepnet import EPNet, PEPNet, PPNet
from llm4msr.models.backbones.ple import PLE
from llm4msr.models.backbones.sar_net import SARNet
from llm4msr.models.backbones.shared_bottom import SharedBottom
from llm4msr.models.backbones.star import Star

__all__ = ["BACKBONES", "Backbone", "InputLayout", "build_backbone"]

BACKBONES: dict[str, type[Backbone]] = {
    "shared_bottom": SharedBottom,
    "star": Star,
    "mlp": MLP,
    "deepfm": DeepFM,
    "dcnv2": DCNv2,
    "mmoe": MMoE,
    "omoe": OMoE,
    "ple": PLE,
    "hinet": HiNet,
    "m3oe": M3oE,
    "aitm": AITM,
    "sar_net": SARNet,
    "m2m": M2M,
    "adasparse": AdaSparse,
    "adaptdhm": AdaptDHM,
    "epnet": EPNet,
    "ppnet": PPNet,
    "pepnet": PEPNet,
    "hamur": HAMUR,
}


def build_backbone(layout: InputLayout, num_scenarios: int, config: ModelConfig) -> Backbone:
    """Builds the backbone that ``model.backbone`` names.

    Raises:
        ValueError: There is none of that name.
    """
    if config.backbone not in BACKBONES:
        raise ValueError(f"model.backbone: no backbone {config.backbone!r}; valid: {', '.join(sorted(BACKBONES))}")
    return BACKBONES[config.backbone](layout, num_scenarios, config)
