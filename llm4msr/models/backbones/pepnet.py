"""PEPNet: gates that know the scenario scale the input (EPNet), gates that know who and what the hidden layers (PPNet).

Axes: B rows, S scenarios, D input width, E embedding width, P width of the prior.
"""

from __future__ import annotations

import itertools

import torch
from torch import nn

from llm4msr.config import ModelConfig
from llm4msr.models.backbones.base import Backbone, InputLayout
from llm4msr.models.layers import Dropout, dense_stack

LARGEST_FACTOR = 2.0  # the paper's gamma


class GateUnit(nn.Module):
    """Gate neural unit: 2 sigmoid(W' relu(W v + b) + b'), a factor in (0, 2) for each of output_dim values."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int) -> None:
        super().__init__()
        self.dense = nn.Sequential(dense_stack(input_dim, (hidden_dim,)), nn.Linear(hidden_dim, output_dim))

    def forward(self, v_BD: torch.Tensor) -> torch.Tensor:
        """Returns the factors, (B, output_dim)."""
        gate_BD: torch.Tensor = self.dense(v_BD)
        return LARGEST_FACTOR * gate_BD.sigmoid()


class PEPNet(Backbone):
    """PEPNet, parameter and embedding personalised network (Chang et al., KDD 2023, arXiv 2302.01115).

    With e_s the scenario's embedding, p = [e_user, e_item, e_s] the prior, and stop(.) what takes no gradient:

        o = Gate([e_s, stop(x)]) * x                                EPNet
        h_0 = o,  h_l = Gate_l([p, stop(o)]) * relu(W_l h_(l-1) + b_l)      PPNet
        logit = w . h + c

    where the gates are gate neural units (`GateUnit`) with a hidden width of adaptive.hidden_dim. The gates thus learn
    from the embeddings of the prior, but never change what they look at besides. e_user and e_item are the columns of
    user_id and item_id in x; data that lacks one of these features goes without.

    Left out: the tasks: one network takes the place of their towers, and the scenario enters by its embedding alone;
    what the paper's priors hold besides (statistics of user and item in the scenario; the author). e_s is not in the
    paper's prior of PPNet: it is here so that PPNet alone knows the scenario too.
    """

    gates_input = True
    gates_hidden = True

    def __init__(self, layout: InputLayout, num_scenarios: int, config: ModelConfig) -> None:
        super().__init__(layout, num_scenarios, config)
        input_dim, gate_dim, embedding_dim = layout.input_dim, config.adaptive.hidden_dim, config.embedding_dim
        self.scenario_embedding_SE = nn.Parameter(torch.randn(num_scenarios, embedding_dim))
        self.ids = [layout.columns(field) for field in ("user_id", "item_id") if field in layout.fields]
        prior_dim = embedding_dim + len(self.ids) * layout.embedding_dim
        gated_dims = config.hidden_dims if self.gates_hidden else ()
        self.input_gate = GateUnit(embedding_dim + input_dim, gate_dim, input_dim) if self.gates_input else None
        self.hidden_gates = nn.ModuleList(GateUnit(prior_dim + input_dim, gate_dim, dim) for dim in gated_dims)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise((input_dim, *config.hidden_dims, 1)))
        self.dropout = Dropout(config.dropout)

    def forward(self, x_BD: torch.Tensor, scenario_B: torch.Tensor) -> torch.Tensor:
        """Returns logit_B."""
        embedding_BE = nn.functional.embedding(scenario_B, self.scenario_embedding_SE)
        prior_BP = torch.cat([*(x_BD[:, columns] for columns in self.ids), embedding_BE], dim=1)
        if self.input_gate is not None:
            x_BD = self.input_gate(torch.cat([embedding_BE, x_BD.detach()], dim=1)) * x_BD
        seen_BP = torch.cat([prior_BP, x_BD.detach()], dim=1)
        *hidden, last = self.layers
        h_BD = x_BD
        for i, layer in enumerate(hidden):
            h_BD = self.dropout(torch.relu(layer(h_BD)))
            if self.gates_hidden:
                h_BD = self.hidden_gates[i](seen_BP) * h_BD
        logit_B1: torch.Tensor = last(h_BD)
        return logit_B1.squeeze(1)


class EPNet(PEPNet):
    """EPNet: PEPNet's gate of the input alone, before an ordinary network."""

    gates_hidden = False


class PPNet(PEPNet):
    """PPNet: PEPNet's gates of the hidden layers alone; o is x."""

    gates_input = False
