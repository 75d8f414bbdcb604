"""A trained model as requests use it: one user, one scenario, many candidates.

Training regenerates every meta layer in each step, for the users of the batch and for all scenarios. A request has one
user, whose layers are generated once and may be kept (`UserLayers`); the scenarios' are constants. What the language
model knows of the items is condensed once for all of them. The scores are those of `MultiScenarioModel.forward` but
for rounding.

Axes: B candidates, N items (row 0: no knowledge), K knowledge width, P width of the item projection, S scenarios,
D input width, R rank, H output width.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from llm4msr.batch import Batch
    from llm4msr.models.llm4msr import KnowledgeMatch, MultiScenarioModel
    from llm4msr.models.meta import KnowledgeTrunk

BLOCK_ROWS = 8192
MIN_LENGTH = 1e-12  # as in torch's normalize
PROJECTED_BYTES = 2**28  # of what is kept for all items; more are condensed anew in each request
# What a score can be made without: see `ServingModel.parts`.
PARTS = ("user_level", "scenario_level", "match", "item_knowledge")


@dataclass(frozen=True)
class UserLayers:
    """What is generated from one user's knowledge.

    Attributes:
        layers: Of each user-level meta layer, what follows its shared part (R, H) or (D, H), and the bias (H,).
        direction_K: The user's standardised vector at length 1, over the deviation of the items' vectors; None without
            a vector, or where the model matches nothing.
    """

    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()
    direction_K: torch.Tensor | None = None


@dataclass(frozen=True)
class Parts:
    """A score and what it is made of.

    Attributes:
        logit_B: The logits.
        x_BD: The backbone's input before the user's meta layers.
        h_BD: The same after them; x_BD itself in a model without such layers.
        match_B1: Cosine of user and item, scaled as the model reads it; None in a model that matches nothing.
        scenario_logit_B: What the scenario's meta layers add to the backbone's logit; None where nothing is added.
    """

    logit_B: torch.Tensor
    x_BD: torch.Tensor
    h_BD: torch.Tensor
    match_B1: torch.Tensor | None
    scenario_logit_B: torch.Tensor | None


class ServingModel:
    """Scores candidates with a trained model; thread-safe, as nothing changes after construction.

    Args:
        model: Trained, in evaluation mode, on the CPU. Its weights must not change any more.
        items_NK: The items' vectors that it was trained with, float16; row 0 is zeros. None for a backbone alone.
    """

    @torch.inference_mode()
    def __init__(self, model: MultiScenarioModel, items_NK: torch.Tensor | None) -> None:
        self.model = model
        self.items_NK = items_NK
        self.width = 0 if items_NK is None else items_NK.shape[1]
        self.scenario_layers = None if model.scenario_meta is None else model.scenario_meta.generate()
        self.item_NP: torch.Tensor | None = None
        if model.item_knowledge is not None:
            assert items_NK is not None
            num_bytes = 4 * len(items_NK) * model.item_knowledge.output_dim
            if num_bytes <= PROJECTED_BYTES:
                trunk = model.item_knowledge.trunk
                assert trunk.missing_Z is not None
                self.item_NP = torch.cat([trunk.condense(block_NK) for block_NK in _blocks(items_NK)])
                self.item_NP[0] = trunk.missing_Z
        if model.match is not None:
            assert items_NK is not None
            lengths = [model.match.standardised(block_NK, "item").norm(dim=1) for block_NK in _blocks(items_NK)]
            self.item_length_N = torch.cat(lengths).clamp(min=MIN_LENGTH)

    @torch.inference_mode()
    def user_layers(self, vector_K: torch.Tensor | None) -> UserLayers:
        """Generates the layers of one user.

        Args:
            vector_K: The user's knowledge; None where there is none.
        """
        model, place = self.model, 0 if vector_K is None else 1
        if not model.reads_users:
            return UserLayers()
        vectors_UK = torch.zeros(2, self.width)
        if vector_K is not None:
            vectors_UK[1] = vector_K
        layers: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()
        direction_K = None
        if model.user_meta is not None:
            generated = model.user_meta.generate(vectors_UK)
            layers = tuple((own[place].clone(), bias[place].clone()) for own, bias in generated)
        if model.match is not None and vector_K is not None:
            unit_K = nn.functional.normalize(model.match.standardised(vectors_UK[1:], "user"), dim=1)[0]
            direction_K = unit_K / model.match.item_std_K
        return UserLayers(layers, direction_K)

    def user_layers_bytes(self) -> int:
        """Returns the memory of one user's layers."""
        user = self.user_layers(torch.ones(self.width) if self.width else None)
        tensors = [tensor for layer in user.layers for tensor in layer]
        return sum(t.nbytes for t in (*tensors, user.direction_K) if t is not None)

    def __call__(self, batch: Batch, user: UserLayers, item_B: torch.Tensor, scenario: int) -> torch.Tensor:
        """Returns logit_B.

        Args:
            batch: The candidates, all in one scenario; its knowledge is not read.
            user: Of the user whom they are for.
            item_B: Row of the items' vectors of each candidate, int64.
            scenario: Index of the scenario.
        """
        return self.parts(batch, user, item_B, scenario).logit_B

    @torch.inference_mode()
    def parts(
        self, batch: Batch, user: UserLayers, item_B: torch.Tensor, scenario: int, without: Set[str] = frozenset()
    ) -> Parts:
        """Returns the logits and what they are made of.

        Args:
            batch: As for a call, likewise the next three.
            user: See there.
            item_B: See there.
            scenario: See there.
            without: Of `PARTS`, what to leave out, each without a change to the others. user_level: the layers are
                those of a user without knowledge. scenario_level: their logit is not added. match: the input is 0, its
                mean. item_knowledge: the items have the projection of one without knowledge.
        """
        model, parts, match_B1, scenario_logit_B = self.model, [self.model.embedding(batch)], None, None
        if model.item_knowledge is not None:
            shown_B = torch.zeros_like(item_B) if "item_knowledge" in without else item_B
            parts.append(self._projected(model.item_knowledge.trunk, shown_B))
        if model.match is not None:
            match_B1 = torch.zeros(len(item_B), 1) if "match" in without else self._match(model.match, user, item_B)
            parts.append(match_B1)
        x_BD = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        h_BD = x_BD
        if model.user_meta is not None:
            layers = self.user_layers(None).layers if "user_level" in without else user.layers
            h_BD = model.user_meta.apply_generated(x_BD, layers)
        logit_B = model.backbone(h_BD, batch.scenario_B)
        if model.scenario_meta is not None and self.scenario_layers is not None and "scenario_level" not in without:
            first = model.scenario_meta.layers[0].shared_part(h_BD)
            scenario_logit_B = model.scenario_meta.apply_generated(first, self.scenario_layers[scenario])
            logit_B = logit_B + scenario_logit_B
        return Parts(logit_B, x_BD, h_BD, match_B1, scenario_logit_B)

    def _projected(self, trunk: KnowledgeTrunk, item_B: torch.Tensor) -> torch.Tensor:
        if self.item_NP is not None:
            return self.item_NP[item_B]
        assert self.items_NK is not None and trunk.missing_Z is not None
        projected_BP = trunk.condense(self.items_NK[item_B].float())
        projected_BP[item_B == 0] = trunk.missing_Z
        return projected_BP

    def _match(self, match: KnowledgeMatch, user: UserLayers, item_B: torch.Tensor) -> torch.Tensor:
        if user.direction_K is None:
            return torch.zeros(len(item_B), 1)
        assert self.items_NK is not None
        # cos = ((v - mean) / std) . u / |(v - mean) / std|, with std taken to the user's side.
        product_B = (self.items_NK[item_B].float() - match.item_mean_K) @ user.direction_K
        cosine_B = product_B / self.item_length_N[item_B]
        return torch.where(item_B > 0, (cosine_B - match.mean) / match.std, 0.0).unsqueeze(1)


def _blocks(items_NK: torch.Tensor) -> Iterator[torch.Tensor]:
    return (block_NK.float() for block_NK in torch.split(items_NK, BLOCK_ROWS))
