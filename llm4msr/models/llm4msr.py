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
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from llm4msr.config import ConfigError, MetaConfig, ModelConfig
from llm4msr.models.backbones import Backbone, build_backbone
from llm4msr.models.embedding import FeatureEmbedding
from llm4msr.models.layers import Order, ScenarioRows, module_list
from llm4msr.models.meta import KnowledgeTrunk, MetaLayer, SubjectRows
from llm4msr.schema import FeatureSchema

if TYPE_CHECKING:
    from llm4msr.batch import Batch
    from llm4msr.knowledge.table import KnowledgeTable


MIN_STD = 1e-6
NUM_PAIRS = 10_000


class ItemKnowledge(nn.Module):
    """Item knowledge as a feature: each distinct item's vector condensed K -> item_knowledge_dims.

    An item without knowledge has a learned P-vector. KAR condenses with a mixture of experts; here it is one stack.
    """

    def __init__(self, knowledge_dim: int, config: ModelConfig) -> None:
        super().__init__()
        self.trunk = KnowledgeTrunk(knowledge_dim, config.item_knowledge_dims, missing=True)
        self.output_dim = self.trunk.output_dim

    def forward(self, knowledge_UK: torch.Tensor, index_B: torch.Tensor) -> torch.Tensor:
        """Returns (B, P)."""
        z_UP: torch.Tensor = self.trunk(knowledge_UK)
        return z_UP[index_B]


class KnowledgeMatch(nn.Module):
    """How near the user's knowledge is to the item's: the cosine of the two vectors as one more input.

    Both are standardised first. The cosines are brought to about unit scale by their mean and deviation over random
    pairs of a user and an item; where either has no knowledge the input is 0, the mean.
    """

    mean: torch.Tensor
    std: torch.Tensor
    item_mean_K: torch.Tensor
    item_std_K: torch.Tensor

    def __init__(self, knowledge_dim: int) -> None:
        super().__init__()
        for name in ("user_mean_K", "item_mean_K"):
            self.register_buffer(name, torch.zeros(knowledge_dim))
        for name in ("user_std_K", "item_std_K"):
            self.register_buffer(name, torch.ones(knowledge_dim))
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))

    def set_statistics(
        self, user_mean_K: torch.Tensor, user_std_K: torch.Tensor, item_mean_K: torch.Tensor, item_std_K: torch.Tensor
    ) -> None:
        """Sets mean and standard deviation of the knowledge over users and over items."""
        for level, mean_K, std_K in (("user", user_mean_K, user_std_K), ("item", item_mean_K, item_std_K)):
            getattr(self, f"{level}_mean_K").copy_(mean_K)
            getattr(self, f"{level}_std_K").copy_(std_K.clamp(min=MIN_STD))

    def set_scale(self, user_PK: torch.Tensor, item_PK: torch.Tensor) -> None:
        """Sets mean and deviation of the cosine to those of P random pairs; without a pair they stay 0 and 1."""
        if len(user_PK) > 1:
            cosine_P = (self._unit(user_PK, "user") * self._unit(item_PK, "item")).sum(1)
            self.mean.copy_(cosine_P.mean())
            self.std.copy_(cosine_P.std().clamp(min=MIN_STD))

    def forward(
        self, user_UK: torch.Tensor, user_B: torch.Tensor, item_UK: torch.Tensor, item_B: torch.Tensor
    ) -> torch.Tensor:
        """Returns (B, 1)."""
        cosine_B = (self._unit(user_UK, "user")[user_B] * self._unit(item_UK, "item")[item_B]).sum(1)
        known_B = (user_B > 0) & (item_B > 0)
        return torch.where(known_B, (cosine_B - self.mean) / self.std, 0.0).unsqueeze(1)

    def standardised(self, vectors_UK: torch.Tensor, level: str) -> torch.Tensor:
        """Returns vectors of users or items ("user", "item") over mean and deviation of their level."""
        mean_K: torch.Tensor = getattr(self, f"{level}_mean_K")
        std_K: torch.Tensor = getattr(self, f"{level}_std_K")
        return (vectors_UK - mean_K) / std_K

    def _unit(self, vectors_UK: torch.Tensor, level: str) -> torch.Tensor:
        return nn.functional.normalize(self.standardised(vectors_UK, level), dim=1)


class UserMeta(nn.Module):
    """User-level meta layers: h = x + act(x W_u + b_u), one weight per distinct user."""

    def __init__(self, knowledge_dim: int, input_dim: int, config: MetaConfig) -> None:
        super().__init__()
        self.residual = config.residual
        self.trunk = KnowledgeTrunk(knowledge_dim, config.trunk_dims, missing=True)
        self.layers = module_list(
            MetaLayer(self.trunk.output_dim, input_dim, input_dim, config.weight_form, config.rank)
            for _ in range(config.num_user_layers)
        )
        if config.residual:
            for layer in self.layers:
                layer.shrink()

    def forward(self, x_BD: torch.Tensor, knowledge_UK: torch.Tensor, index_B: torch.Tensor) -> torch.Tensor:
        """Transforms x_BD."""
        z_UZ = self.trunk(knowledge_UK)
        rows = SubjectRows(index_B, *z_UZ.shape)
        for layer in self.layers:
            x_BD = self._add(x_BD, layer(x_BD, z_UZ, rows))
        return x_BD

    def generate(self, knowledge_UK: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Returns each layer's `MetaLayer.generate`."""
        z_UZ = self.trunk(knowledge_UK)
        return [layer.generate(z_UZ) for layer in self.layers]

    def apply_generated(
        self, x_BD: torch.Tensor, generated: Sequence[tuple[torch.Tensor, torch.Tensor]]
    ) -> torch.Tensor:
        """Transforms rows that are all of one subject, with its part of what `generate` returned."""
        for layer, (own_RH, bias_H) in zip(self.layers, generated, strict=True):
            x_BD = self._add(x_BD, torch.addmm(bias_H, layer.shared_part(x_BD), own_RH))
        return x_BD

    def _add(self, x_BD: torch.Tensor, product_BD: torch.Tensor) -> torch.Tensor:
        changed_BD = nn.functional.gelu(product_BD)
        return x_BD + changed_BD if self.residual else changed_BD


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

    knowledge_SK: torch.Tensor

    def __init__(self, knowledge_dim: int, input_dim: int, num_scenarios: int, config: MetaConfig) -> None:
        super().__init__()
        self.register_buffer("knowledge_SK", torch.zeros(num_scenarios, knowledge_dim))
        self.trunk = KnowledgeTrunk(knowledge_dim, config.trunk_dims, missing=False)
        dims = (input_dim, *config.scenario_dims, 1)
        self.layers = module_list(
            MetaLayer(self.trunk.output_dim, a, b, config.weight_form, config.rank) for a, b in itertools.pairwise(dims)
        )
        self.layers[-1].shrink()

    def forward(self, x_BD: torch.Tensor, scenario_B: torch.Tensor) -> torch.Tensor:
        """Returns logit_B."""
        generated = self.generate()
        rows = ScenarioRows(scenario_B, len(generated))
        shared = rows.sort(self.layers[0].shared_part(x_BD))
        return rows.map(shared, lambda s, part: self.apply_generated(part, generated[s]))

    def generate(self) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
        """Returns the stack of each scenario: `own_part` of the first layer, weights of the others; biases."""
        z_SZ = self.trunk(self.knowledge_SK)
        first, *rest = self.layers
        weights = [first.own_part(z_SZ), *(layer.weight(z_SZ) for layer in rest)]
        biases = [layer.bias_head(z_SZ) for layer in self.layers]
        layers = [
            zip(weight_SDH.unbind(), bias_SH.unbind(), strict=True)
            for weight_SDH, bias_SH in zip(weights, biases, strict=True)
        ]
        return [list(stack) for stack in zip(*layers, strict=True)]

    def apply_generated(
        self, shared: torch.Tensor, generated: Sequence[tuple[torch.Tensor, torch.Tensor]]
    ) -> torch.Tensor:
        """Returns the logit of rows of one scenario.

        Args:
            shared: The first layer's `shared_part` of the rows.
            generated: The scenario's stack.
        """
        x_BD = shared
        for i, (weight_DH, bias_H) in enumerate(generated):
            x_BD = torch.addmm(bias_H, x_BD if i == 0 else nn.functional.gelu(x_BD), weight_DH)
        return x_BD.squeeze(1)


class MultiScenarioModel(nn.Module):
    """Embeddings and a backbone, alone or inside LLM4MSR.

    Args:
        embedding: Batch to x_BD.
        backbone: (x_BD, scenario_B) to logit_B.
        item_knowledge: Columns of x_BD after the embedding's, or None.
        user_meta: User-level meta layers at the bottom, or None.
        scenario_meta: Scenario-level meta layers in parallel, or None.
        match: How near user and item are, the last column of x_BD, or None.
        knowledge_dropout: In training, the share of rows that see no knowledge of their user; of their item likewise.
    """

    def __init__(
        self,
        embedding: FeatureEmbedding,
        backbone: Backbone,
        item_knowledge: ItemKnowledge | None = None,
        user_meta: UserMeta | None = None,
        scenario_meta: ScenarioMeta | None = None,
        match: KnowledgeMatch | None = None,
        knowledge_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.backbone = backbone
        self.item_knowledge = item_knowledge
        self.user_meta = user_meta
        self.scenario_meta = scenario_meta
        self.match = match
        self.knowledge_dropout = knowledge_dropout

    @property
    def reads_users(self) -> bool:
        """Whether anything depends on the knowledge of the user."""
        return self.user_meta is not None or self.match is not None

    def knowledge_parameters(self) -> dict[str, nn.Parameter]:
        """Returns what is between knowledge vectors and the backbone, by name: meta networks and item knowledge."""
        parts = ("user_meta.", "scenario_meta.", "item_knowledge.")
        return {name: parameter for name, parameter in self.named_parameters() if name.startswith(parts)}

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns logit_B, and the squared norm of each row's embeddings (B,) for their penalty."""
        order = Order(batch.scenario_B)
        batch = _sort(batch, order)  # its few ids, so that whatever follows finds each scenario's rows together
        x_BD = self.embedding(batch)
        norm_B = x_BD[:, : self.embedding.embedded_dim].square().sum(1)
        user_B, item_B = batch.knowledge_index_B, batch.item_knowledge_index_B
        if self.training and item_B is not None and user_B is not None:
            item_B = hide_share(item_B, self.knowledge_dropout) if self.item_knowledge is not None else item_B
            user_B = hide_share(user_B, self.knowledge_dropout) if self.reads_users else user_B
        if self.item_knowledge is not None:
            x_BD = torch.cat([x_BD, self.item_knowledge(batch.item_knowledge_UK, item_B)], dim=1)
        if self.match is not None:
            match_B1 = self.match(batch.knowledge_UK, user_B, batch.item_knowledge_UK, item_B)
            x_BD = torch.cat([x_BD, match_B1], dim=1)
        if self.user_meta is not None:
            x_BD = self.user_meta(x_BD, batch.knowledge_UK, user_B)
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
        ids_BF=order.sort(batch.ids_BF),
        numeric_BN=order.sort(batch.numeric_BN),
        sequences=tuple(map(order.sort, batch.sequences)),
        histories=tuple(map(order.sort, batch.histories)),
        scenario_B=order.sort(batch.scenario_B),
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
        ConfigError: Nothing would read the knowledge.
    """
    embedding = FeatureEmbedding(schema, config.embedding_dim, config.unseen_dropout, materialize)
    num_scenarios = len(schema.scenarios)
    if knowledge_dim is None:
        return MultiScenarioModel(embedding, build_backbone(embedding.layout(), num_scenarios, config))
    meta = config.meta
    if not (meta.user_level or meta.scenario_level or item_knowledge):
        raise ConfigError(
            "model.meta.user_level and model.meta.scenario_level are both off and no item has knowledge: "
            "nothing would read the knowledge; use experiment.knowledge none instead"
        )
    items = ItemKnowledge(knowledge_dim, config) if item_knowledge else None
    match = KnowledgeMatch(knowledge_dim) if items and config.knowledge_match else None
    layout = embedding.layout((items.output_dim if items else 0) + (1 if match else 0))
    return MultiScenarioModel(
        embedding,
        build_backbone(layout, num_scenarios, config),
        items,
        UserMeta(knowledge_dim, layout.input_dim, meta) if meta.user_level else None,
        ScenarioMeta(knowledge_dim, layout.input_dim, num_scenarios, meta) if meta.scenario_level else None,
        match,
        meta.knowledge_dropout,
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
    if model.match is not None:
        model.match.set_statistics(*map(torch.from_numpy, (*table.user_statistics(), *table.item_statistics())))
        model.match.set_scale(*map(torch.from_numpy, table.random_pairs(NUM_PAIRS)))
    if model.scenario_meta is not None:
        scenarios_SK = torch.tensor(table.scenarios_SK)
        model.scenario_meta.knowledge_SK.copy_(scenarios_SK)
        # A few scenarios say nothing about single components: one scale for all, that of what tells them apart.
        centred_SK = scenarios_SK - scenarios_SK.mean(0)
        scale = centred_SK.square().mean().sqrt()
        model.scenario_meta.trunk.set_statistics(scenarios_SK.mean(0), torch.where(scale > 0, scale, 1.0))
