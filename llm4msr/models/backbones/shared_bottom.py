"""SharedBottom: one bottom network, one tower per scenario.

Axes: B rows, S scenarios, D input width.
"""

from __future__ import annotations

import torch
from torch import nn

from llm4msr.config import ModelConfig
from llm4msr.models.backbones.base import Backbone, InputLayout
from llm4msr.models.layers import ScenarioRows, dense_stack


class SharedBottom(Backbone):
    """One bottom network for all scenarios, one tower per scenario (Caruana 1997, as used for multi-scenario ranking).

    The scenario enters by the choice of the tower alone.
    """

    def __init__(self, layout: InputLayout, num_scenarios: int, config: ModelConfig) -> None:
        super().__init__(layout, num_scenarios, config)
        self.bottom = dense_stack(layout.input_dim, config.hidden_dims, config.dropout)
        bottom_dim = config.hidden_dims[-1] if config.hidden_dims else layout.input_dim
        tower_out_dim = config.tower_dims[-1] if config.tower_dims else bottom_dim
        self.towers = nn.ModuleList(
            nn.Sequential(dense_stack(bottom_dim, config.tower_dims, config.dropout), nn.Linear(tower_out_dim, 1))
            for _ in range(num_scenarios)
        )

    def forward(self, x_BD: torch.Tensor, scenario_B: torch.Tensor) -> torch.Tensor:
        """Returns logit_B."""
        rows = ScenarioRows(scenario_B, len(self.towers))
        return rows.map(rows.sort(self.bottom(x_BD)), lambda s, x: self.towers[s](x).squeeze(1))
