"""The sections about single families of backbones; a backbone reads what it needs and nothing else."""

from __future__ import annotations

from llm4msr.config.base import PositiveInt, Section


class ExpertsConfig(Section):
    """Backbones made of experts and gates."""

    num_experts: PositiveInt = 4
    """Experts that all scenarios share."""
    num_scenario_experts: PositiveInt = 1
    """Experts of each scenario's own."""
    num_levels: PositiveInt = 2
    """Layers of experts stacked."""


class AdaptiveConfig(Section):
    """Backbones whose weights, gates or adapters follow from the scenario."""

    hidden_dim: PositiveInt = 64
    """Hidden width of the network that makes them."""
