"""Single-scenario models as controls: MLP, DeepFM, DCNv2, trained on the rows of all scenarios together.

They show what a backbone gains by treating scenarios apart. All their weights are shared; the scenario is one more
embedded feature, as is usual where one model serves several pages. Without it they could not even learn that one
scenario has more positives than another, which would be an unfair control.

Axes: B rows, S scenarios, F embedded features, E embedding width, D input width, H hidden width.
"""

from __future__ import annotations

import torch
from torch import nn

from llm4msr.config import ModelConfig
from llm4msr.models.backbones.base import Backbone, InputLayout
from llm4msr.models.layers import dense_stack

NUM_CROSS_LAYERS = 3


class Control(Backbone):
    """A model of x and the scenario's embedding beside it.

    Attributes:
        input_dim: D + E.
        hidden: The deep part, ``config.hidden_dims`` wide.
        hidden_dim: H, its output's width.
    """

    def __init__(self, layout: InputLayout, num_scenarios: int, config: ModelConfig) -> None:
        super().__init__(layout, num_scenarios, config)
        self.scenario_embedding_SE = nn.Parameter(torch.randn(num_scenarios, layout.embedding_dim) * 0.05)
        self.input_dim = layout.input_dim + layout.embedding_dim
        self.hidden = dense_stack(self.input_dim, config.hidden_dims, config.dropout)
        self.hidden_dim = config.hidden_dims[-1] if config.hidden_dims else self.input_dim

    def with_scenario(self, x_BD: torch.Tensor, scenario_B: torch.Tensor) -> torch.Tensor:
        """Returns the scenario's embedding as one more feature in front of the others, (B, E + D)."""
        return torch.cat([nn.functional.embedding(scenario_B, self.scenario_embedding_SE), x_BD], dim=1)


class MLP(Control):
    """The plain deep model: a dense stack of the embeddings (as in Covington et al., RecSys 2016)."""

    def __init__(self, layout: InputLayout, num_scenarios: int, config: ModelConfig) -> None:
        super().__init__(layout, num_scenarios, config)
        self.last = nn.Linear(self.hidden_dim, 1)

    def forward(self, x_BD: torch.Tensor, scenario_B: torch.Tensor) -> torch.Tensor:
        """Returns logit_B."""
        logit_B1: torch.Tensor = self.last(self.hidden(self.with_scenario(x_BD, scenario_B)))
        return logit_B1.squeeze(1)


class DeepFM(Control):
    """DeepFM (Guo et al., IJCAI 2017, section 2): a factorisation machine and a dense stack on the same embeddings.

    logit = first order + second order + deep. The second order is the sum of <v_i, v_j> over all pairs of embedded
    features, the scenario among them. The paper's first order is one weight per feature value; here it is a linear
    layer on the embeddings and the other columns, as the backbone is given no ids: of each value it knows what its
    embedding says.
    """

    def __init__(self, layout: InputLayout, num_scenarios: int, config: ModelConfig) -> None:
        super().__init__(layout, num_scenarios, config)
        self.layout = layout
        self.first_order = nn.Linear(self.input_dim, 1)
        self.last = nn.Linear(self.hidden_dim, 1)

    def forward(self, x_BD: torch.Tensor, scenario_B: torch.Tensor) -> torch.Tensor:
        """Returns logit_B."""
        x_BD = self.with_scenario(x_BD, scenario_B)
        num_fields, width = 1 + len(self.layout.fields), self.layout.embedding_dim
        fields_BFE = torch.unflatten(x_BD[:, : num_fields * width], 1, (num_fields, width))
        # All pairs' products: half of what the squared sum has beyond the squares.
        second_order_B = 0.5 * (fields_BFE.sum(1).square() - fields_BFE.square().sum(1)).sum(1)
        logit_B1: torch.Tensor = self.first_order(x_BD) + self.last(self.hidden(x_BD))
        return logit_B1.squeeze(1) + second_order_B


class DCNv2(Control):
    """DCN-V2 (Wang et al., WWW 2021, arXiv 2008.13535): crosses of full-rank matrices beside a dense stack.

    x_{l+1} = x_0 * (W_l x_l + b_l) + x_l, three times, with a matrix W_l of full rank; the parallel structure: the last
    cross layer's output beside the dense stack's, and a linear layer on both. Left out: the low-rank mixture of
    crosses, and the stacked structure.
    """

    def __init__(self, layout: InputLayout, num_scenarios: int, config: ModelConfig) -> None:
        super().__init__(layout, num_scenarios, config)
        self.crosses = nn.ModuleList(nn.Linear(self.input_dim, self.input_dim) for _ in range(NUM_CROSS_LAYERS))
        self.last = nn.Linear(self.input_dim + self.hidden_dim, 1)

    def forward(self, x_BD: torch.Tensor, scenario_B: torch.Tensor) -> torch.Tensor:
        """Returns logit_B."""
        x0_BD = x_BD = self.with_scenario(x_BD, scenario_B)
        for cross in self.crosses:
            x_BD = x0_BD * cross(x_BD) + x_BD
        logit_B1: torch.Tensor = self.last(torch.cat([x_BD, self.hidden(x0_BD)], dim=1))
        return logit_B1.squeeze(1)
