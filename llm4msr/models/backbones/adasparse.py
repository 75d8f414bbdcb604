"""AdaSparse: one network, whose neurons each scenario weighs and prunes.

Axes: B rows, S scenarios, D width of a layer's input, E embedding width.
"""

from __future__ import annotations

import itertools

import torch
from torch import nn

from llm4msr.config import ModelConfig
from llm4msr.models.backbones.base import Backbone, InputLayout
from llm4msr.models.layers import Dropout

LARGEST_FACTOR = 2.0  # the paper's beta


class AdaSparse(Backbone):
    """AdaSparse, adaptively sparse structures (Yang et al., CIKM 2022, arXiv 2206.13108).

    A domain-aware pruner beside each layer l makes a factor for each of the layer's inputs from the scenario's
    embedding e_s and those inputs:

        u_l = sigmoid(P_l [e_s, h_l] + p_l)
        h_(l+1) = relu(W_l (f_l * h_l) + b_l),  h_0 = x;  the last layer has no activation

    By adaptive.pruning, with beta = 2 and the threshold t = adaptive.pruning_threshold, the factor f_l is

        binary: 1 where u_l > t, else 0;    scale: beta u_l;    fusion: beta u_l where beta u_l > t, else 0

    A factor cut to 0 or 1 passes its gradient on as if it had not been cut (straight-through), so that a pruned neuron
    can come back.

    Left out: the loss that keeps the share of pruned neurons in a range, since a backbone owns no loss; the
    temperature inside the sigmoid, which the paper lets grow during training: here it is 1.
    """

    def __init__(self, layout: InputLayout, num_scenarios: int, config: ModelConfig) -> None:
        super().__init__(layout, num_scenarios, config)
        self.pruning, self.threshold = config.adaptive.pruning, config.adaptive.pruning_threshold
        self.scenario_embedding_SE = nn.Parameter(torch.randn(num_scenarios, config.embedding_dim))
        dims = (layout.input_dim, *config.hidden_dims, 1)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(dims))
        self.pruners = nn.ModuleList(nn.Linear(config.embedding_dim + dim, dim) for dim in dims[:-1])
        self.dropout = Dropout(config.dropout)

    def forward(self, x_BD: torch.Tensor, scenario_B: torch.Tensor) -> torch.Tensor:
        """Returns logit_B."""
        embedding_BE = nn.functional.embedding(scenario_B, self.scenario_embedding_SE)
        for i, (layer, pruner) in enumerate(zip(self.layers, self.pruners, strict=True)):
            h_BD = x_BD if i == 0 else self.dropout(torch.relu(x_BD))
            x_BD = layer(h_BD * self._factor(pruner(torch.cat([embedding_BE, h_BD], dim=1)).sigmoid()))
        return x_BD.squeeze(1)

    def _factor(self, u_BD: torch.Tensor) -> torch.Tensor:
        """Returns f of u; exactly zero where it prunes."""
        if self.pruning == "scale":
            return LARGEST_FACTOR * u_BD
        soft_BD = u_BD if self.pruning == "binary" else LARGEST_FACTOR * u_BD
        kept_BD = soft_BD > self.threshold
        hard_BD = kept_BD.to(soft_BD.dtype) if self.pruning == "binary" else soft_BD.detach() * kept_BD
        return hard_BD + (soft_BD - soft_BD.detach())
