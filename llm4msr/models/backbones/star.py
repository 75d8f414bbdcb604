"""STAR: star topology adaptive recommender.

Axes: B rows, S scenarios, D input width, H hidden width, E embedding width.
"""

from __future__ import annotations

import itertools

import torch
from torch import nn

from llm4msr.config import ModelConfig
from llm4msr.models.backbones.base import Backbone, InputLayout
from llm4msr.models.layers import Dropout, ScenarioNorm, ScenarioRows, dense_stack


class Star(Backbone):
    """STAR, star topology adaptive recommender (Sheng et al., CIKM 2021, arXiv 2101.11427).

    Partitioned normalisation of the input (eq. 3-4); fully connected layers whose weight is the element-wise product
    of a shared and a scenario's weight and whose bias is their sum (eq. 5-6); an auxiliary network that sees the
    scenario's embedding and adds its logit (eq. 7-8). The scenario weights start at one and their biases at zero, so
    that all scenarios start as the shared network. The last layer has no activation and no normalisation.
    """

    def __init__(self, layout: InputLayout, num_scenarios: int, config: ModelConfig) -> None:
        super().__init__(layout, num_scenarios, config)
        input_dim = layout.input_dim
        self.norm = ScenarioNorm(num_scenarios, input_dim) if config.scenario_norm else None
        dims = (input_dim, *config.hidden_dims, 1)
        self.shared = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(dims))
        self.weights_SHD = nn.ParameterList(torch.ones(num_scenarios, b, a) for a, b in itertools.pairwise(dims))
        self.biases_SH = nn.ParameterList(torch.zeros(num_scenarios, b) for b in dims[1:])
        self.dropout = Dropout(config.dropout)
        self.scenario_embedding = nn.Parameter(torch.randn(num_scenarios, config.embedding_dim) * 0.05)
        auxiliary_dim = config.hidden_dims[-1] if config.hidden_dims else config.embedding_dim
        self.auxiliary = nn.Sequential(
            dense_stack(input_dim + config.embedding_dim, (auxiliary_dim,), config.dropout), nn.Linear(auxiliary_dim, 1)
        )

    def forward(self, x_BD: torch.Tensor, scenario_B: torch.Tensor) -> torch.Tensor:
        """Returns logit_B."""
        rows = ScenarioRows(scenario_B, len(self.scenario_embedding))
        x_BD = rows.sort(x_BD)
        if self.norm is not None:
            x_BD = self.norm(x_BD, rows)
        # All scenarios' weights at once: their gradients are then stacked, not added up one scenario after another.
        weights = [(shared.weight * own).unbind() for shared, own in zip(self.shared, self.weights_SHD, strict=True)]
        biases = [(shared.bias + own).unbind() for shared, own in zip(self.shared, self.biases_SH, strict=True)]

        def star(s: int, x_BD: torch.Tensor) -> torch.Tensor:
            for i, (weight_S, bias_S) in enumerate(zip(weights, biases, strict=True)):
                x_BD = nn.functional.linear(x_BD if i == 0 else self.dropout(torch.relu(x_BD)), weight_S[s], bias_S[s])
            return x_BD.squeeze(1)

        return rows.map(x_BD, lambda s, x: star(s, x) + self._auxiliary(s, x))

    def _auxiliary(self, s: int, x_BD: torch.Tensor) -> torch.Tensor:
        """The auxiliary network on x beside scenario s's embedding, which only shifts the first layer's bias."""
        hidden, last = self.auxiliary
        assert isinstance(hidden, nn.Sequential) and isinstance(hidden[0], nn.Linear)
        widths = [x_BD.shape[1], self.scenario_embedding.shape[1]]
        x_weight_HD, embedding_weight_HE = torch.split(hidden[0].weight, widths, dim=1)
        bias_H = hidden[0].bias + embedding_weight_HE @ self.scenario_embedding[s]
        logit_B1: torch.Tensor = last(hidden[1:](nn.functional.linear(x_BD, x_weight_HD, bias_H)))
        return logit_B1.squeeze(1)
