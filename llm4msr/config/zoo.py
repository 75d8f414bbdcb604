"""The sections about single families of backbones; a backbone reads what it needs and nothing else."""

from __future__ import annotations

from typing import Literal

from llm4msr.config.base import Fraction, PositiveInt, Section


class ExpertsConfig(Section):
    """Backbones made of experts and gates: mmoe, omoe, ple, hinet, m3oe, sar_net, m2m."""

    num_experts: PositiveInt = 4
    """Experts that all scenarios share; hinet: sub-experts inside each of its experts."""
    num_scenario_experts: PositiveInt = 1
    """ple, sar_net: experts of each scenario's own."""
    num_levels: PositiveInt = 2
    """ple: levels of experts stacked; 1 is CGC."""


class AdaptiveConfig(Section):
    """Backbones whose weights, gates or adapters follow from the scenario."""

    hidden_dim: PositiveInt = 64
    """Hidden width of the network that makes them (m2m, epnet, ppnet, pepnet, hamur)."""
    rank: PositiveInt = 16
    """hamur: width of the square core that its hyper-network makes for each row."""
    adapter_dim: PositiveInt = 32
    """hamur: width inside an adapter."""
    pruning: Literal["binary", "scale", "fusion"] = "fusion"
    """adasparse: binary keeps a neuron or not, scale weighs it in (0, 2), fusion weighs it or cuts it off."""
    pruning_threshold: Fraction = 0.25
    """adasparse: a neuron whose factor is not above this is cut off (binary, fusion)."""
    num_clusters: PositiveInt = 4
    """adaptdhm: clusters of rows, each with a network of its own."""
