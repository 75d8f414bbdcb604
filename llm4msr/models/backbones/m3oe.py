"""M3oE: a star layer, then shared experts and scenarios' experts, merged by two learned weights.

Axes: B rows, S scenarios, N shared experts, D input width, H hidden width.
"""

from __future__ import annotations

import torch
from torch import nn

from llm4msr.config import ModelConfig
from llm4msr.models.backbones.base import Backbone, InputLayout
from llm4msr.models.backbones.experts import Experts, Gate, towers
from llm4msr.models.layers import ScenarioRows, dense_stack


class M3oE(Backbone):
    """M3oE, multi-domain multi-task mixture-of-experts (Zhang et al., SIGIR 2024, arXiv 2404.18465), for one task.

    Extraction: a STAR layer, whose weight is a shared times a scenario's and whose bias is their sum, then a dense
    layer; a dense layer around both is added. On its output h run N shared experts, mixed by a gate per scenario, and
    one expert per scenario. Fusion on two levels, for a row of scenario s:

        own_s = b expert_s(h) + (1 - b) / (S - 1) sum of the other scenarios' experts of h
        z_s = gate_s(h) . shared experts(h) + f own_s

    and a tower per scenario on z_s. b and f are sigmoids of learned numbers; b starts above one half, so that a
    scenario's expert starts as its own.

    Left out: the task's experts and their two weights, as there is one task; the search of the fusion weights on
    validation rows by AutoML (they are trained with everything else); layer normalisation. The extraction is
    ``hidden_dims[0]`` wide, a choice of ours. Each scenario's expert sees every row: the cost grows with the scenarios.
    """

    def __init__(self, layout: InputLayout, num_scenarios: int, config: ModelConfig) -> None:
        super().__init__(layout, num_scenarios, config)
        width = config.hidden_dims[0] if config.hidden_dims else layout.input_dim
        self.star_shared = nn.Linear(layout.input_dim, width)
        self.star_weight_SHD = nn.Parameter(torch.ones(num_scenarios, width, layout.input_dim))
        self.star_bias_SH = nn.Parameter(torch.zeros(num_scenarios, width))
        self.dense = dense_stack(width, (width,), config.dropout)
        self.skip = dense_stack(layout.input_dim, (width,), config.dropout)
        num_experts = config.experts.num_experts
        self.experts = Experts(num_experts, width, config.hidden_dims, config.dropout)
        self.gates = nn.ModuleList(Gate(width, num_experts) for _ in range(num_scenarios))
        self.scenario_experts = Experts(num_scenarios, width, config.hidden_dims, config.dropout)
        self.balance = nn.Parameter(torch.tensor(1.0))
        self.fusion = nn.Parameter(torch.tensor(0.0))
        self.towers = towers(num_scenarios, self.experts.output_dim, config)

    def forward(self, x_BD: torch.Tensor, scenario_B: torch.Tensor) -> torch.Tensor:
        """Returns logit_B."""
        rows = ScenarioRows(scenario_B, len(self.towers))
        h_BH = self._extract(rows.sort(x_BD), rows)
        expert_NBH = self.experts(h_BH).split(rows.sizes, dim=1)
        scenario_SBH = self.scenario_experts(h_BH).split(rows.sizes, dim=1)
        balance, fusion = self.balance.sigmoid(), self.fusion.sigmoid()
        others_weight = (1 - balance) / max(len(self.towers) - 1, 1)

        def tower(s: int, h_BH: torch.Tensor) -> torch.Tensor:
            own_BH, all_BH = scenario_SBH[s][s], scenario_SBH[s].sum(0)
            balanced_BH = balance * own_BH + others_weight * (all_BH - own_BH)
            logit_B: torch.Tensor = self.towers[s](self.gates[s](h_BH, expert_NBH[s]) + fusion * balanced_BH)
            return logit_B

        return rows.map(h_BH, tower)

    def _extract(self, x_BD: torch.Tensor, rows: ScenarioRows) -> torch.Tensor:
        """The star layer and its dense layer on sorted rows, (B, H), still sorted."""
        weights = (self.star_shared.weight * self.star_weight_SHD).unbind()
        biases = (self.star_shared.bias + self.star_bias_SH).unbind()
        star = [nn.functional.linear(x, weights[s], biases[s]) for s, x in enumerate(torch.split(x_BD, rows.sizes))]
        h_BH: torch.Tensor = self.dense(torch.cat(star)) + self.skip(x_BD)
        return h_BH
