"""SAR-Net: the scenario's own scaling of the input, shared and own experts, the scenario's own gate.

Axes: B rows, S scenarios, D input width, N experts, H expert width.
"""

from __future__ import annotations

import torch
from torch import nn

from llm4msr.config import ModelConfig
from llm4msr.models.backbones.base import Backbone, InputLayout
from llm4msr.models.backbones.experts import Experts, Gate, Tower
from llm4msr.models.layers import ScenarioRows


class SARNet(Backbone):
    """SAR-Net, scenario-aware ranking network (Shen et al., CIKM 2021, arXiv 2110.06475).

    For a row x of scenario s:

        h = a_s * x + b_s                           the scenario-specific linear transformation, element by element
        v_i = expert_i(h)                           experts that all scenarios share, and those of s alone
        g = softmax(G_s h)                          the multi-scenario gate
        logit = tower(sum_i g_i v_i)

    a_s starts at one and b_s at zero. Experts have the widths hidden_dims, the tower, shared by all, tower_dims.

    Left out: the attention over the user's behaviour in all scenarios, since a backbone sees x alone; the fairness
    coefficients that weigh rows exposed by hand, which no data here tells.
    """

    def __init__(self, layout: InputLayout, num_scenarios: int, config: ModelConfig) -> None:
        super().__init__(layout, num_scenarios, config)
        input_dim, experts = layout.input_dim, config.experts
        self.scale_SD = nn.Parameter(torch.ones(num_scenarios, input_dim))
        self.shift_SD = nn.Parameter(torch.zeros(num_scenarios, input_dim))
        self.shared_experts = Experts(experts.num_experts, input_dim, config.hidden_dims, config.dropout)
        self.own_experts = nn.ModuleList(
            Experts(experts.num_scenario_experts, input_dim, config.hidden_dims, config.dropout)
            for _ in range(num_scenarios)
        )
        num_seen = experts.num_experts + experts.num_scenario_experts
        self.gates = nn.ModuleList(Gate(input_dim, num_seen) for _ in range(num_scenarios))
        self.tower = Tower(self.shared_experts.output_dim, config)

    def forward(self, x_BD: torch.Tensor, scenario_B: torch.Tensor) -> torch.Tensor:
        """Returns logit_B."""
        rows = ScenarioRows(scenario_B, len(self.gates))
        scales, shifts = self.scale_SD.unbind(), self.shift_SD.unbind()
        parts = torch.split(rows.sort(x_BD), rows.sizes)
        hidden_BD = torch.cat([torch.addcmul(shifts[s], x_BD, scales[s]) for s, x_BD in enumerate(parts)])
        shared_NBH = self.shared_experts(hidden_BD).split(rows.sizes, dim=1)

        def fuse(s: int, hidden_BD: torch.Tensor) -> torch.Tensor:
            fused_BH: torch.Tensor = self.gates[s](
                hidden_BD, torch.cat([shared_NBH[s], self.own_experts[s](hidden_BD)])
            )
            return fused_BH

        logit_B: torch.Tensor = self.tower(rows.map(hidden_BD, fuse))
        return logit_B
