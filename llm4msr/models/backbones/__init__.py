"""The zoo of backbones, one class each, and the one table that names them. `base` is the template for a new one."""

from __future__ import annotations

from llm4msr.config import ModelConfig
from llm4msr.models.backbones.base import Backbone, InputLayout
from llm4msr.models.backbones.shared_bottom import SharedBottom
from llm4msr.models.backbones.star import Star

__all__ = ["BACKBONES", "Backbone", "InputLayout", "build_backbone"]

BACKBONES: dict[str, type[Backbone]] = {
    "shared_bottom": SharedBottom,
    "star": Star,
}


def build_backbone(layout: InputLayout, num_scenarios: int, config: ModelConfig) -> Backbone:
    """Builds the backbone that ``model.backbone`` names.

    Raises:
        ValueError: There is none of that name.
    """
    if config.backbone not in BACKBONES:
        raise ValueError(f"model.backbone: no backbone {config.backbone!r}; valid: {', '.join(sorted(BACKBONES))}")
    return BACKBONES[config.backbone](layout, num_scenarios, config)
