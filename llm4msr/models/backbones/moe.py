"""MMoE and OMoE: experts that all scenarios share, mixed by a gate per scenario or by one gate.

Axes: B rows, S scenarios, N experts, D input width, H width of an expert's output.
"""

from __future__ import annotations

import torch
from torch import nn

from llm4msr.config import ModelConfig
from llm4msr.models.backbones.base import Backbone, InputLayout
from llm4msr.models.backbones.experts import Experts, Gate, Mixture, towers
from llm4msr.models.layers import ScenarioRows


class MMoE(Backbone):
    """MMoE, multi-gate mixture-of-experts (Ma et al., KDD 2018, section 4), with scenarios in the place of tasks.

    f_s(x) = sum_n softmax(W_s x)_n expert_n(x), logit = tower_s(f_s(x)). The paper trains every task on every row; here
    a row has one scenario, whose gate and tower it goes through. Left out: nothing.
    """

    def __init__(self, layout: InputLayout, num_scenarios: int, config: ModelConfig) -> None:
        super().__init__(layout, num_scenarios, config)
        num_experts = config.experts.num_experts
        self.experts = Experts(num_experts, layout.input_dim, config.hidden_dims, config.dropout)
        self.gates = nn.ModuleList(Gate(layout.input_dim, num_experts) for _ in range(num_scenarios))
        self.towers = towers(num_scenarios, self.experts.output_dim, config)

    def forward(self, x_BD: torch.Tensor, scenario_B: torch.Tensor) -> torch.Tensor:
        """Returns logit_B."""
        rows = ScenarioRows(scenario_B, len(self.towers))
        x_BD = rows.sort(x_BD)
        expert_NBH = self.experts(x_BD).split(rows.sizes, dim=1)
        return rows.map(x_BD, lambda s, x: self.towers[s](self.gates[s](x, expert_NBH[s])))


class OMoE(Backbone):
    """OMoE, one-gate mixture-of-experts: MMoE with one gate for all scenarios (Ma et al., KDD 2018, section 4).

    The scenario enters by the choice of the tower alone.
    """

    def __init__(self, layout: InputLayout, num_scenarios: int, config: ModelConfig) -> None:
        super().__init__(layout, num_scenarios, config)
        self.mixture = Mixture(config.experts.num_experts, layout.input_dim, config)
        self.towers = towers(num_scenarios, self.mixture.output_dim, config)

    def forward(self, x_BD: torch.Tensor, scenario_B: torch.Tensor) -> torch.Tensor:
        """Returns logit_B."""
        rows = ScenarioRows(scenario_B, len(self.towers))
        return rows.map(rows.sort(self.mixture(x_BD)), lambda s, x: self.towers[s](x))
