"""HiNet: an expert of the scenario, one that all share, and what other scenarios' experts have to add.

Axes: B rows, S scenarios, D input width, E embedding width, H width of an expert's output.
"""

from __future__ import annotations

import torch
from torch import nn

from llm4msr.config import ModelConfig
from llm4msr.models.backbones.base import Backbone, InputLayout
from llm4msr.models.backbones.experts import Mixture, towers
from llm4msr.models.layers import ScenarioRows


class HiNet(Backbone):
    """HiNet, hierarchical information extraction (Zhou et al., ICDE 2023, arXiv 2303.06095): its scenario layer.

    Every expert is a mixture of sub-experts with a gate (the paper's SEI module; ``config.experts.num_experts`` of
    them). A row of scenario s is brought to three vectors: G of the shared expert, S_s of its scenario's expert, and
    A_s = sum over the others j of a_sj S_j of the scenario-aware attention, a_s = softmax(W e_s + b) with a learned
    embedding e_s. As in the authors' code the softmax runs over all scenarios and its own share is left out of the
    sum, so that with two scenarios the transfer can still fade. A tower per scenario takes [A_s, S_s, G].

    Left out: the second layer, extraction by task, as there is one task; the normalisation of the input.
    A scenario's expert sees every row, as the others' attention needs it: the cost grows with the scenarios.
    """

    def __init__(self, layout: InputLayout, num_scenarios: int, config: ModelConfig) -> None:
        super().__init__(layout, num_scenarios, config)
        num_experts = config.experts.num_experts
        self.shared = Mixture(num_experts, layout.input_dim, config)
        self.own = nn.ModuleList(Mixture(num_experts, layout.input_dim, config) for _ in range(num_scenarios))
        self.scenario_embedding_SE = nn.Parameter(torch.randn(num_scenarios, config.embedding_dim) * 0.05)
        self.attention = nn.Linear(config.embedding_dim, num_scenarios)
        self.towers = towers(num_scenarios, 3 * self.shared.output_dim, config)

    def forward(self, x_BD: torch.Tensor, scenario_B: torch.Tensor) -> torch.Tensor:
        """Returns logit_B."""
        rows = ScenarioRows(scenario_B, len(self.towers))
        x_BD = rows.sort(x_BD)
        own_SBH = torch.split(torch.stack([expert(x_BD) for expert in self.own]), rows.sizes, dim=1)
        attention_SS = self.attention(self.scenario_embedding_SE).softmax(1)
        attention_SS = attention_SS * (1 - torch.eye(len(attention_SS), device=attention_SS.device))

        def tower(s: int, shared_BH: torch.Tensor) -> torch.Tensor:
            others_BH = torch.einsum("s,sbh->bh", attention_SS[s], own_SBH[s])
            logit_B: torch.Tensor = self.towers[s](torch.cat([others_BH, own_SBH[s][s], shared_BH], dim=1))
            return logit_B

        return rows.map(self.shared(x_BD), tower)
