"""AdaptDHM: rows are clustered by what they look like, and each cluster has a network of its own.

Axes: B rows, S scenarios, K clusters, D input width, E embedding width, I = D + E, H layer width.
"""

from __future__ import annotations

import itertools

import torch
import torch.distributed as dist
from torch import nn

from llm4msr.config import ModelConfig
from llm4msr.models.backbones.base import Backbone, InputLayout
from llm4msr.models.layers import Dropout, ScenarioRows


class DirectionClusters(nn.Module):
    """Puts each row into the cluster whose centre its direction is nearest to: AdaptDHM's routing.

    With u = (v - mean) / |v - mean| a row's cluster is argmax_k u . c_k. In training the centres first move towards the
    batch, c_k <- unit(0.9 c_k + 0.1 (mean of the u in cluster k)), and the mean follows as a moving average. Both are
    buffers and see the rows of all workers, so that workers agree; in evaluation they rest, so that a row's cluster
    never depends on the rows beside it. A cluster without rows keeps its centre. No gradient passes.

    Args:
        num_clusters: K.
        dim: I.
    """

    momentum = 0.1
    mean_I: torch.Tensor
    centre_KI: torch.Tensor

    def __init__(self, num_clusters: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean_I", torch.zeros(dim))
        self.register_buffer("centre_KI", nn.functional.normalize(torch.randn(num_clusters, dim), dim=1))

    @torch.no_grad()
    def forward(self, v_BI: torch.Tensor) -> torch.Tensor:
        """Returns cluster_B; in float32 under autocast too."""
        with torch.autocast(v_BI.device.type, enabled=False):
            v_BI = v_BI.to(self.mean_I.dtype)
            if self.training:
                self._move(v_BI)
            return self._nearest(v_BI - self.mean_I)

    def _nearest(self, offset_BI: torch.Tensor) -> torch.Tensor:
        return (offset_BI @ self.centre_KI.t()).argmax(dim=1)  # of a direction as of the vector itself

    def _move(self, v_BI: torch.Tensor) -> None:
        offset_BI = v_BI - self.mean_I
        member_BK = nn.functional.one_hot(self._nearest(offset_BI), len(self.centre_KI)).to(v_BI.dtype)
        sums = torch.cat([member_BK.t() @ nn.functional.normalize(offset_BI, dim=1), offset_BI.sum(0, keepdim=True)])
        counts = torch.cat([member_BK.sum(0), member_BK.sum().view(1)])
        sums = torch.cat([sums, counts.unsqueeze(1)], dim=1)  # a line for each cluster, and one for all rows
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
        total, count = torch.split(sums, [len(self.mean_I), 1], dim=1)
        average = total / count.clamp(min=1)  # zero for a cluster without rows, which then keeps its direction
        self.centre_KI.copy_(nn.functional.normalize(self.centre_KI.lerp(average[:-1], self.momentum), dim=1))
        self.mean_I.add_(average[-1], alpha=self.momentum)


class AdaptDHM(Backbone):
    """AdaptDHM, adaptive distribution hierarchical model (Li et al., 2022, arXiv 2211.12105).

    A row v = [x, e_s], its input beside its scenario's embedding, is routed to one of K clusters by
    `DirectionClusters`, and goes through the cluster's network, whose weight is the element-wise product of a shared
    and the cluster's weight and whose bias is their sum:

        h_(l+1) = relu((W_l * W_lk) h_l + b_l + b_lk),  h_0 = v;  the last layer has no activation

    The scenario's embedding is a part of v and nothing else: what a scenario's rows have in common with others' is for
    the clusters to find, as in the paper. The clusters' weights start at one and their biases at zero.

    Different from the paper: rows are measured from their moving mean and by direction alone, and a row moves the
    centre of its own cluster only, once a step. The paper weighs a row by softmax coefficients, several rounds a step;
    for the short vectors of fresh embeddings these are all but equal, and the centres would fall together.
    """

    def __init__(self, layout: InputLayout, num_scenarios: int, config: ModelConfig) -> None:
        super().__init__(layout, num_scenarios, config)
        num_clusters, input_dim = config.adaptive.num_clusters, layout.input_dim + config.embedding_dim
        self.scenario_embedding_SE = nn.Parameter(torch.randn(num_scenarios, config.embedding_dim) * 0.05)
        self.clusters = DirectionClusters(num_clusters, input_dim)
        dims = (input_dim, *config.hidden_dims, 1)
        self.shared = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(dims))
        self.weights_KHD = nn.ParameterList(torch.ones(num_clusters, b, a) for a, b in itertools.pairwise(dims))
        self.biases_KH = nn.ParameterList(torch.zeros(num_clusters, b) for b in dims[1:])
        self.dropout = Dropout(config.dropout)

    def forward(self, x_BD: torch.Tensor, scenario_B: torch.Tensor) -> torch.Tensor:
        """Returns logit_B."""
        v_BI = torch.cat([x_BD, nn.functional.embedding(scenario_B, self.scenario_embedding_SE)], dim=1)
        rows = ScenarioRows(self.clusters(v_BI), len(self.clusters.centre_KI))  # of a cluster, as if of a scenario
        weights = [(shared.weight * own).unbind() for shared, own in zip(self.shared, self.weights_KHD, strict=True)]
        biases = [(shared.bias + own).unbind() for shared, own in zip(self.shared, self.biases_KH, strict=True)]

        def network(k: int, h_BI: torch.Tensor) -> torch.Tensor:
            for i, (weight_K, bias_K) in enumerate(zip(weights, biases, strict=True)):
                h_BI = nn.functional.linear(h_BI if i == 0 else self.dropout(torch.relu(h_BI)), weight_K[k], bias_K[k])
            return h_BI.squeeze(1)

        return rows.map(rows.sort(v_BI), network)
