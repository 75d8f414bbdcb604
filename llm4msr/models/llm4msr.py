"""LLM4MSR: hierarchical meta networks around any multi-scenario backbone (Wang et al., CIKM 2024, arXiv 2406.12529).

User-level meta layers transform the backbone's input at the bottom, scenario-level meta layers run in parallel with
the backbone and add their logit. Both are generated from vectors that a frozen language model made offline.
What the paper leaves open is a reconstruction, listed in docs/method.md. Item knowledge is beyond the paper: a feature
of the item, as in KAR (Xi et al., arXiv 2306.10933).

Axes: B rows, S scenarios, U distinct users or items + 1 (row 0: no knowledge), K knowledge width, D input width,
P width of the item projection.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from llm4msr.config import MetaConfig, ModelConfig
from llm4msr.models.backbones import Backbone, build_backbone
from llm4msr.models.embedding import FeatureEmbedding
from llm4msr.models.layers import Order, ScenarioRows
from llm4msr.models.meta import KnowledgeTrunk, MetaLayer, SubjectRows
from llm4msr.schema import FeatureSchema

if TYPE_CHECKING:
    from llm4msr.batch import Batch
    from llm4msr.knowledge.table import KnowledgeTable


class ItemKnowledge(nn.Module):
    """Item knowledge as a feature: each distinct item's vector condensed K -> item_knowledge_dims.

    An item without knowledge has a learned P-vector. KAR condenses with a mixture of experts; here it is one stack.
    """

    def __init__(self, knowledge_dim: int, config: ModelConfig) -> None:
        super().__init__()
        self.knowledge_dropout = config.meta.knowledge_dropout
        self.trunk = KnowledgeTrunk(knowledge_dim, config.item_knowledge_dims, missing=True)
        self.output_dim = self.trunk.output_dim

    def forward(self, knowledge_UK: torch.Tensor, index_B: torch.Tensor) -> torch.Tensor:
        """Returns (B, P); in training a share of the rows is shown without knowledge."""
        if self.training:
            index_B = hide_share(index_B, self.knowledge_dropout)
        return self.trunk(knowledge_UK)[index_B]


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
        if self.training:
            index_B = hide_share(index_B, self.knowledge_dropout)
        z_UZ = self.trunk(knowledge_UK)
        rows = SubjectRows(index_B, *z_UZ.shape)
        for layer in self.layers:
            changed_BD = nn.functional.gelu(layer(x_BD, z_UZ, rows))
            x_BD = x_BD + changed_BD if self.residual else changed_BD
        return x_BD


def hide_share(index_B: torch.Tensor, share: float) -> torch.Tensor:
    """Returns the index with a random share of the rows at 0, which stands for no knowledge."""
    if share == 0:
        return index_B
    hidden_B = torch.rand(len(index_B), device=index_B.device) < share
    return index_B.masked_fill(hidden_B, 0)


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
        first, *rest = self.layers
        weights = [first.own_part(z_SZ), *(layer.weight(z_SZ) for layer in rest)]
        biases = [layer.bias_head(z_SZ) for layer in self.layers]
        weights_of = list(zip(*(weight_SDH.unbind() for weight_SDH in weights), strict=True))
        biases_of = list(zip(*(bias_SH.unbind() for bias_SH in biases), strict=True))

        def stack(s: int, x_BD: torch.Tensor) -> torch.Tensor:
            for i, (weight_DH, bias_H) in enumerate(zip(weights_of[s], biases_of[s], strict=True)):
                x_BD = torch.addmm(bias_H, x_BD if i == 0 else nn.functional.gelu(x_BD), weight_DH)
            return x_BD.squeeze(1)

        rows = ScenarioRows(scenario_B, len(z_SZ))
        return rows.map(rows.sort(first.shared_part(x_BD)), stack)


class MultiScenarioModel(nn.Module):
    """Embeddings and a backbone, alone or inside LLM4MSR.

    Args:
        embedding: Batch to x_BD.
        backbone: (x_BD, scenario_B) to logit_B.
        item_knowledge: Columns of x_BD after the embedding's, or None.
        user_meta: User-level meta layers at the bottom, or None.
        scenario_meta: Scenario-level meta layers in parallel, or None.
    """

    def __init__(
        self,
        embedding: FeatureEmbedding,
        backbone: Backbone,
        item_knowledge: ItemKnowledge | None = None,
        user_meta: UserMeta | None = None,
        scenario_meta: ScenarioMeta | None = None,
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.backbone = backbone
        self.item_knowledge = item_knowledge
        self.user_meta = user_meta
        self.scenario_meta = scenario_meta

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns logit_B, and the squared norm of each row's embeddings (B,) for their penalty."""
        order = Order(batch.scenario_B)
        batch = _sort(batch, order)  # its few ids, so that whatever follows finds each scenario's rows together
        x_BD = self.embedding(batch)
        norm_B = x_BD[:, : self.embedding.embedded_dim].square().sum(1)
        if self.item_knowledge is not None:
            item_BP = self.item_knowledge(batch.item_knowledge_UK, batch.item_knowledge_index_B)
            x_BD = torch.cat([x_BD, item_BP], dim=1)
        if self.user_meta is not None:
            x_BD = self.user_meta(x_BD, batch.knowledge_UK, batch.knowledge_index_B)
        logit_B = self.backbone(x_BD, batch.scenario_B)
        if self.scenario_meta is not None:
            logit_B = logit_B + self.scenario_meta(x_BD, batch.scenario_B)
        return order.restore(logit_B), order.restore(norm_B)


def _sort(batch: Batch, order: Order) -> Batch:
    """Returns the batch with what the model reads of a row sorted by scenario."""

    def sort(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return tensor if tensor is None else order.sort(tensor)

    return replace(
        batch,
        ids_BF=sort(batch.ids_BF),
        numeric_BN=sort(batch.numeric_BN),
        sequences=tuple(map(sort, batch.sequences)),
        histories=tuple(map(sort, batch.histories)),
        scenario_B=sort(batch.scenario_B),
        knowledge_index_B=sort(batch.knowledge_index_B),
        item_knowledge_index_B=sort(batch.item_knowledge_index_B),
    )


def build_model(
    schema: FeatureSchema,
    config: ModelConfig,
    knowledge_dim: int | None,
    item_knowledge: bool = False,
    materialize: bool = True,
) -> MultiScenarioModel:
    """Builds the model from schema and configuration alone.

    Args:
        schema: Features and scenarios.
        config: Backbone, widths, meta networks.
        knowledge_dim: K; None builds the backbone alone.
        item_knowledge: Whether the knowledge has vectors of items; ignored without knowledge.
        materialize: False leaves the embedding tables on the meta device, for who will spread them over workers.

    Raises:
        ValueError: Unknown backbone, or knowledge that nothing would read.
    """
    embedding = FeatureEmbedding(schema, config.embedding_dim, config.unseen_dropout, materialize)
    num_scenarios = len(schema.scenarios)
    if knowledge_dim is None:
        return MultiScenarioModel(embedding, build_backbone(embedding.layout(), num_scenarios, config))
    meta = config.meta
    if not (meta.user_level or meta.scenario_level or item_knowledge):
        raise ValueError(
            "model.meta.user_level and model.meta.scenario_level are both off and no item has knowledge: "
            "nothing would read the knowledge; use experiment.knowledge none instead"
        )
    items = ItemKnowledge(knowledge_dim, config) if item_knowledge else None
    layout = embedding.layout(items.output_dim if items else 0)
    return MultiScenarioModel(
        embedding,
        build_backbone(layout, num_scenarios, config),
        items,
        UserMeta(knowledge_dim, layout.input_dim, meta) if meta.user_level else None,
        ScenarioMeta(knowledge_dim, layout.input_dim, num_scenarios, meta) if meta.scenario_level else None,
    )


def set_knowledge(model: MultiScenarioModel, table: KnowledgeTable) -> None:
    """Gives a fresh model its knowledge: the statistics that standardise it, and the scenarios' vectors.

    Users' vectors are standardised component by component over the users' vectors, items' over the items'. Scenarios'
    vectors lose their mean and are divided by the root mean square of the rest, so that they are of unit scale too.

    Args:
        model: Built with the table's width.
        table: What it will be trained with.
    """
    for part, statistics in (
        (model.user_meta, table.user_statistics),
        (model.item_knowledge, table.item_statistics),
    ):
        if part is not None:
            part.trunk.set_statistics(*map(torch.from_numpy, statistics()))
    if model.scenario_meta is not None:
        scenarios_SK = torch.tensor(table.scenarios_SK)
        model.scenario_meta.knowledge_SK.copy_(scenarios_SK)
        # A few scenarios say nothing about single components: one scale for all, that of what tells them apart.
        centred_SK = scenarios_SK - scenarios_SK.mean(0)
        scale = centred_SK.square().mean().sqrt()
        model.scenario_meta.trunk.set_statistics(scenarios_SK.mean(0), torch.where(scale > 0, scale, 1.0))
