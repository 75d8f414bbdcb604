"""HAMUR: adapters in a shared network, each scenario's own, with cores that a hyper-network makes for each row.

Axes: B rows, S scenarios, D input width, H width of a hidden layer, A adapter width, R rank.
"""

from __future__ import annotations

import itertools

import torch
from torch import nn

from llm4msr.config import ModelConfig
from llm4msr.models.backbones.base import Backbone, InputLayout
from llm4msr.models.layers import Dropout, ScenarioNorm, ScenarioRows, dense_stack


class ScenarioAdapter(nn.Module):
    """What is added to a hidden layer: norm_s(sigmoid(h U_s C V_s + b_s) U'_s C V'_s), with the row's core C.

    The products are taken from the left: no row has more weights than its core.

    Args:
        num_scenarios: S.
        hidden_dim: H.
        adapter_dim: A.
        rank: R.
    """

    def __init__(self, num_scenarios: int, hidden_dim: int, adapter_dim: int, rank: int) -> None:
        super().__init__()

        def factor(input_dim: int, output_dim: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(num_scenarios, input_dim, output_dim) * input_dim**-0.5)

        self.down_in_SHR, self.down_out_SRA = factor(hidden_dim, rank), factor(rank, adapter_dim)
        self.down_bias_SA = nn.Parameter(torch.zeros(num_scenarios, adapter_dim))
        self.up_in_SAR, self.up_out_SRH = factor(adapter_dim, rank), factor(rank, hidden_dim)
        self.norm = ScenarioNorm(num_scenarios, hidden_dim)

    def forward(self, h_BH: torch.Tensor, core_BRR: torch.Tensor, rows: ScenarioRows) -> torch.Tensor:
        """Returns (B, H) for rows sorted by scenario."""
        factors = (self.down_in_SHR, self.down_out_SRA, self.down_bias_SA, self.up_in_SAR, self.up_out_SRH)
        slices = (torch.split(h_BH, rows.sizes), torch.split(core_BRR, rows.sizes))
        parts = zip(*slices, *(f.unbind() for f in factors), strict=True)
        adapted = [
            _product(_product(h, down_in, core, down_out).add(bias).sigmoid(), up_in, core, up_out)
            for h, core, down_in, down_out, bias, up_in, up_out in parts
        ]
        normalised_BH: torch.Tensor = self.norm(torch.cat(adapted), rows)
        return normalised_BH


def _product(x_BD: torch.Tensor, in_DR: torch.Tensor, core_BRR: torch.Tensor, out_RH: torch.Tensor) -> torch.Tensor:
    return torch.bmm((x_BD @ in_DR).unsqueeze(1), core_BRR).squeeze(1) @ out_RH


class HAMUR(Backbone):
    """HAMUR, hyper adapter for multi-domain recommendation (Li et al., CIKM 2023, arXiv 2309.06217).

    A hyper-network that all scenarios share makes an R x R core for each row, C = Hyper(x); the scenarios' adapters
    (`ScenarioAdapter`) use it between factors of their own, after each hidden layer of a network shared by all:

        h_l = relu(W_l h'_(l-1) + b_l),  h'_l = h_l + norm_s(sigmoid(h_l U_ls C V_ls + b_ls) U'_ls C V'_ls),  h'_0 = x
        logit = w . h' + c

    The paper's domain normalisation is norm_s, `ScenarioNorm`. The up projection has no bias, for the normalisation's
    shift is one. Cores start near the unit matrix. R is adaptive.rank, A adaptive.adapter_dim; the hyper-network has
    one hidden layer of adaptive.hidden_dim.

    Left out: the batch normalisation between the layers of network and hyper-network. Different from the authors' code:
    there each scenario has a whole network and the factors are shared; here the network is shared and the adapters
    are the scenario's, as the paper's words have it (domain-specific adapter, domain-shared hyper-network).
    """

    def __init__(self, layout: InputLayout, num_scenarios: int, config: ModelConfig) -> None:
        super().__init__(layout, num_scenarios, config)
        input_dim, adaptive = layout.input_dim, config.adaptive
        self.rank = adaptive.rank
        hidden = dense_stack(input_dim, (adaptive.hidden_dim,), config.dropout)
        core = nn.Linear(adaptive.hidden_dim, self.rank**2)
        nn.init.eye_(core.bias.data.view(self.rank, self.rank))
        self.hyper = nn.Sequential(hidden, core)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise((input_dim, *config.hidden_dims, 1)))
        self.adapters = nn.ModuleList(
            ScenarioAdapter(num_scenarios, dim, adaptive.adapter_dim, self.rank) for dim in config.hidden_dims
        )
        self.num_scenarios = num_scenarios
        self.dropout = Dropout(config.dropout)

    def forward(self, x_BD: torch.Tensor, scenario_B: torch.Tensor) -> torch.Tensor:
        """Returns logit_B."""
        rows = ScenarioRows(scenario_B, self.num_scenarios)
        h_BH = rows.sort(x_BD)
        core_BRR = self.hyper(h_BH).view(-1, self.rank, self.rank)
        *hidden, last = self.layers
        for layer, adapter in zip(hidden, self.adapters, strict=True):
            h_BH = self.dropout(torch.relu(layer(h_BH)))
            h_BH = h_BH + adapter(h_BH, core_BRR, rows)
        return rows.map(last(h_BH).squeeze(1), lambda _, logit_B: logit_B)
