"""AITM: towers in a row, each told what the one before it found.

Axes: B rows, S scenarios, D input width, H width of a tower's output.
"""

from __future__ import annotations

import torch
from torch import nn

from llm4msr.config import ModelConfig
from llm4msr.models.backbones.base import Backbone, InputLayout
from llm4msr.models.layers import ScenarioRows, dense_stack


class AITM(Backbone):
    """AITM, adaptive information transfer (Xi et al., KDD 2021, arXiv 2105.08489), between scenarios' towers.

    Every scenario has a tower q_s(x) on the shared embeddings (``hidden_dims``, then ``tower_dims``). The first
    scenario's z_0 is q_0; each next one is told z_{s-1} by p_s = g_s(z_{s-1}), one dense layer, and weighs the two:
    z_s = sum over u in {p_s, q_s} of w_u h_1(u), w = softmax over u of <h_2(u), h_3(u)> / sqrt(H). h_1, h_2, h_3 are
    linear layers that all transfers share. logit = a linear layer of scenario s on z_s.

    What it means here: the paper's chain is one of conversions (a click before a purchase), in which each step needs
    the one before. Scenarios have no such order: the chain follows the order in which the data names them, and a row
    of scenario s runs the towers 0 .. s. So the first scenario is told nothing, a tower also learns from the rows of
    the scenarios after it, and another order of scenarios is another model. It fits where the first is the large one
    and the later ones build on it.

    Left out: the calibrator, a loss that keeps a step's probability below the one before it: scenarios have none.
    """

    def __init__(self, layout: InputLayout, num_scenarios: int, config: ModelConfig) -> None:
        super().__init__(layout, num_scenarios, config)
        dims = (*config.hidden_dims, *config.tower_dims)
        output_dim = dims[-1] if dims else layout.input_dim
        self.towers = nn.ModuleList(dense_stack(layout.input_dim, dims, config.dropout) for _ in range(num_scenarios))
        self.messages = nn.ModuleList(
            dense_stack(output_dim, (output_dim,), config.dropout) for _ in range(num_scenarios - 1)
        )
        self.transfer = Transfer(output_dim) if num_scenarios > 1 else None
        self.heads = nn.ModuleList(nn.Linear(output_dim, 1) for _ in range(num_scenarios))

    def forward(self, x_BD: torch.Tensor, scenario_B: torch.Tensor) -> torch.Tensor:
        """Returns logit_B."""
        rows = ScenarioRows(scenario_B, len(self.towers))
        x_BD = rows.sort(x_BD)  # what scenarios s, s + 1, .. need of tower s is then the rows' tail
        z_BH = self.towers[0](x_BD)
        logits = []
        for s, size in enumerate(rows.sizes):
            if self.transfer is not None and s > 0:
                z_BH = self.transfer(self.messages[s - 1](z_BH), self.towers[s](x_BD))
            logits.append(self.heads[s](z_BH[:size]))
            x_BD, z_BH = x_BD[size:], z_BH[size:]
        return rows.map(torch.cat(logits), lambda s, logit_B1: logit_B1.squeeze(1))


class Transfer(nn.Module):
    """The paper's AIT module: weighs message and own vector against each other, each by attention to itself."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.value, self.query, self.key = (nn.Linear(dim, dim) for _ in range(3))

    def forward(self, message_BH: torch.Tensor, own_BH: torch.Tensor) -> torch.Tensor:
        """Returns z_BH."""
        pair_2BH = torch.stack([message_BH, own_BH])
        score_2B1 = (self.query(pair_2BH) * self.key(pair_2BH)).sum(2, keepdim=True) * own_BH.shape[1] ** -0.5
        z_BH: torch.Tensor = (score_2B1.softmax(0) * self.value(pair_2BH)).sum(0)
        return z_BH
