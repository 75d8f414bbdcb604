"""LLM4MSR: hierarchical meta networks around any multi-scenario backbone (Wang et al., CIKM 2024, arXiv 2406.12529).

User-level meta layers transform the backbone's input at the bottom, scenario-level meta layers run in parallel with
the backbone and add their logit. Both are generated from vectors that a frozen language model made offline.
What the paper leaves open is a reconstruction, listed in docs/method.md.

Axes: B rows, S scenarios, U distinct users + 1 (row 0: no knowledge), K knowledge width, D input width.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from torch import nn

from llm4msr.config import MetaConfig, ModelConfig
from llm4msr.models.backbones import Backbone, build_backbone
from llm4msr.models.layers import FeatureEmbedding
from llm4msr.models.meta import KnowledgeTrunk, MetaLayer
from llm4msr.schema import FeatureSchema

if TYPE_CHECKING:
    from llm4msr.batch import Batch


class UserMeta(nn.Module):
    """User-level meta layers: h = x + act(x W_u + b_u), one weight per distinct user."""

    def __init__(self, knowledge_dim: int, input_dim: int, config: MetaConfig) -> None:
        super().__init__()
        self.residual = config.residual
        self.knowledge_dropout = config.knowledge_dropout
        self.trunk = KnowledgeTrunk(knowledge_dim, config.trunk_dims, missing=True)
        self.layers = nn.ModuleList(
            MetaLayer(self.trunk.output_dim, input_dim, input_dim, config.weight_form, config.rank)
            for _ in range(config.num_user_layers)
        )

    def forward(self, x_BD: torch.Tensor, knowledge_UK: torch.Tensor, index_B: torch.Tensor) -> torch.Tensor:
        """Transforms x_BD; in training a share of the rows is shown without knowledge."""
        if self.training and self.knowledge_dropout > 0:
            hidden_B = torch.rand(len(index_B), device=index_B.device) < self.knowledge_dropout
            index_B = index_B.masked_fill(hidden_B, 0)
        z_UZ = self.trunk(knowledge_UK)
        for layer in self.layers:
            changed_BD = nn.functional.gelu(layer(x_BD, z_UZ, index_B))
            x_BD = x_BD + changed_BD if self.residual else changed_BD
        return x_BD


class ScenarioMeta(nn.Module):
    """Scenario-level meta layers: a generated stack D -> scenario_dims -> 1 on the backbone's input.

    The knowledge of all S scenarios is a buffer: the layers are generated once a step, and are constants when serving.
    """

    def __init__(self, knowledge_dim: int, input_dim: int, num_scenarios: int, config: MetaConfig) -> None:
        super().__init__()
        self.register_buffer("knowledge_SK", torch.zeros(num_scenarios, knowledge_dim))
        self.trunk = KnowledgeTrunk(knowledge_dim, config.trunk_dims, missing=False)
        dims = (input_dim, *config.scenario_dims, 1)
        self.layers = nn.ModuleList(
            MetaLayer(self.trunk.output_dim, a, b, config.weight_form, config.rank) for a, b in itertools.pairwise(dims)
        )

    def forward(self, x_BD: torch.Tensor, scenario_B: torch.Tensor) -> torch.Tensor:
        """Returns logit_B."""
        z_SZ = self.trunk(self.knowledge_SK)
        for i, layer in enumerate(self.layers):
            x_BD = layer(x_BD, z_SZ, scenario_B)
            if i + 1 < len(self.layers):
                x_BD = nn.functional.gelu(x_BD)
        return x_BD.squeeze(1)


class MultiScenarioModel(nn.Module):
    """Embeddings and a backbone, alone or inside LLM4MSR.

    Args:
        embedding: Batch to x_BD.
        backbone: (x_BD, scenario_B) to logit_B.
        user_meta: User-level meta layers at the bottom, or None.
        scenario_meta: Scenario-level meta layers in parallel, or None.
    """

    def __init__(
        self,
        embedding: FeatureEmbedding,
        backbone: Backbone,
        user_meta: UserMeta | None = None,
        scenario_meta: ScenarioMeta | None = None,
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.backbone = backbone
        self.user_meta = user_meta
        self.scenario_meta = scenario_meta

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns logit_B, and the squared norm of each row's embeddings (B,) for their penalty."""
        x_BD = self.embedding(batch)
        norm_B = x_BD[:, : self.embedding.embedded_dim].square().sum(1)
        if self.user_meta is not None:
            x_BD = self.user_meta(x_BD, batch.knowledge_UK, batch.knowledge_index_B)
        logit_B = self.backbone(x_BD, batch.scenario_B)
        if self.scenario_meta is not None:
            logit_B = logit_B + self.scenario_meta(x_BD, batch.scenario_B)
        return logit_B, norm_B


def build_model(schema: FeatureSchema, config: ModelConfig, knowledge_dim: int | None) -> MultiScenarioModel:
    """Builds the model from schema and configuration alone.

    Args:
        schema: Features and scenarios.
        config: Backbone, widths, meta networks.
        knowledge_dim: K; None builds the backbone alone.

    Raises:
        ValueError: Unknown backbone, or meta networks with both levels switched off.
    """
    embedding = FeatureEmbedding(schema, config.embedding_dim, config.unseen_dropout)
    num_scenarios = len(schema.scenarios)
    backbone = build_backbone(embedding.output_dim, num_scenarios, config)
    if knowledge_dim is None:
        return MultiScenarioModel(embedding, backbone)
    meta = config.meta
    if not (meta.user_level or meta.scenario_level):
        raise ValueError(
            "model.meta.user_level and model.meta.scenario_level are both off: "
            "nothing would read the knowledge; use experiment.knowledge none instead"
        )
    return MultiScenarioModel(
        embedding,
        backbone,
        UserMeta(knowledge_dim, embedding.output_dim, meta) if meta.user_level else None,
        ScenarioMeta(knowledge_dim, embedding.output_dim, num_scenarios, meta) if meta.scenario_level else None,
    )


def set_knowledge(model: MultiScenarioModel, users_UK: torch.Tensor, scenarios_SK: torch.Tensor) -> None:
    """Gives a fresh model its knowledge: the statistics that standardise it, and the scenarios' vectors.

    Users' vectors are standardised component by component over the users that have any. Scenarios' vectors lose
    their mean and are divided by the root mean square of the rest, so that they are of unit scale too.

    Args:
        model: Built with a knowledge width.
        users_UK: Vectors of the users with knowledge (without row 0).
        scenarios_SK: Vectors of the scenarios.
    """
    if model.user_meta is not None:
        model.user_meta.trunk.set_statistics(users_UK.mean(0), users_UK.std(0, unbiased=False))
    if model.scenario_meta is not None:
        model.scenario_meta.knowledge_SK.copy_(scenarios_SK)
        # A few scenarios say nothing about single components: one scale for all, that of what tells them apart.
        centred_SK = scenarios_SK - scenarios_SK.mean(0)
        scale = centred_SK.square().mean().sqrt()
        model.scenario_meta.trunk.set_statistics(scenarios_SK.mean(0), torch.where(scale > 0, scale, 1.0))
