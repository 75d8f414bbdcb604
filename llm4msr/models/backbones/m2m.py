"""M2M: attention over experts and a residual tower whose weights the scenario generates.

Axes: B rows, S scenarios, D input width, E embedding width, Z scenario knowledge width, N experts, H expert width.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import leaky_relu

from llm4msr.config import ModelConfig
from llm4msr.models.backbones.base import Backbone, InputLayout
from llm4msr.models.backbones.experts import Experts
from llm4msr.models.layers import ScenarioRows
from llm4msr.models.meta import MetaLayer

NUM_TOWER_LAYERS = 2


class M2M(Backbone):
    """M2M, multi-scenario multi-task meta learning (Zhang et al., WSDM 2022, arXiv 2201.06814).

    The scenario's embedding e_s becomes the scenario knowledge z_s = act(Z e_s + c), and a meta unit generates a layer
    from it: Meta(h) = W(z_s) h + b(z_s), both linear in z_s. act is a leaky ReLU. For a row x of scenario s:

        v_i = expert_i(x)                                           i = 1 .. N
        g = softmax_i(q . act(Meta_0(v_i)))                         meta attention
        h_0 = sum_i g_i v_i
        h_j = act(Meta_j(h_(j-1)) + h_(j-1))                        meta tower, 2 residual layers
        logit = w . h + c

    The generated layers are made once a step for each scenario. Experts have the widths hidden_dims; z_s is
    adaptive.hidden_dim wide.

    Left out: the tasks, hence the task's part in the attention (there is one task, so it would be a constant); the
    transformer over the behaviour sequence, since a backbone sees x alone; the advertiser's part of the scenario
    knowledge, which would need weights for each row.
    """

    def __init__(self, layout: InputLayout, num_scenarios: int, config: ModelConfig) -> None:
        super().__init__(layout, num_scenarios, config)
        input_dim, knowledge_dim = layout.input_dim, config.adaptive.hidden_dim
        self.experts = Experts(config.experts.num_experts, input_dim, config.hidden_dims, config.dropout)
        expert_dim = self.experts.output_dim
        self.scenario_embedding_SE = nn.Parameter(torch.randn(num_scenarios, config.embedding_dim))
        self.scenario_knowledge = nn.Linear(config.embedding_dim, knowledge_dim)

        def meta_unit() -> MetaLayer:
            return MetaLayer(knowledge_dim, expert_dim, expert_dim, "full", rank=expert_dim)

        self.attention = meta_unit()
        self.query = nn.Linear(expert_dim, 1, bias=False)
        self.tower = nn.ModuleList(meta_unit() for _ in range(NUM_TOWER_LAYERS))
        self.last = nn.Linear(expert_dim, 1)

    def forward(self, x_BD: torch.Tensor, scenario_B: torch.Tensor) -> torch.Tensor:
        """Returns logit_B."""
        rows = ScenarioRows(scenario_B, len(self.scenario_embedding_SE))
        z_SZ = leaky_relu(self.scenario_knowledge(self.scenario_embedding_SE))
        attention, *tower = (
            list(zip(unit.weight(z_SZ).unbind(), unit.bias_head(z_SZ).unbind(), strict=True))
            for unit in (self.attention, *self.tower)
        )
        x_BD = rows.sort(x_BD)
        expert_NBH = self.experts(x_BD).split(rows.sizes, dim=1)

        def meta(s: int, _: torch.Tensor) -> torch.Tensor:
            weight_HH, bias_H = attention[s]
            score_NB = self.query(leaky_relu(expert_NBH[s] @ weight_HH + bias_H)).squeeze(2)
            h_BH = torch.einsum("nb,nbh->bh", score_NB.softmax(0), expert_NBH[s])
            for layer in tower:
                weight_HH, bias_H = layer[s]
                h_BH = leaky_relu(torch.addmm(bias_H, h_BH, weight_HH) + h_BH)
            logit_B1: torch.Tensor = self.last(h_BH)
            return logit_B1.squeeze(1)

        return rows.map(x_BD, meta)
