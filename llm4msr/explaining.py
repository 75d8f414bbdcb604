"""Why one score is what it is: what each part of the model adds, how far the knowledge of the user moves the input.

The model is loaded and its tables are at hand; nothing is read. A part of the model is left out as a whole and the
score made again. Parts work on one another, so the differences do not add up to that without all. What is absent has
a reason in words. A score is that of `Ranker.rank` for a request with the same context.

Left out: attributions to single features, gradients, and a history or vector that a request may bring.

Axes: N candidates, D input width, K knowledge width, S scenarios.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np
import torch

from llm4msr.knowledge.nearest import cosine
from llm4msr.knowledge.table import KnowledgeTable
from llm4msr.models.serving import PARTS, Parts
from llm4msr.ranker import Ranker
from llm4msr.request import ContextValue, Key, RankRequest
from llm4msr.subjects import NO_KNOWLEDGE, ItemFacts, Neighbours, UserFacts, describe_item, describe_user

Context = Mapping[str, ContextValue]

_NO_PART = {
    "user_level": "this model has no user-level meta layers",
    "scenario_level": "this model has no scenario-level meta layers",
    "match": "this model does not compare user and item",
    "item_knowledge": "this model has no knowledge of items",
    "all": NO_KNOWLEDGE,
}


@dataclass(frozen=True)
class Measured:
    """A number, or why there is none."""

    value: float | None
    reason: str | None = None


@dataclass(frozen=True)
class Without:
    """The score without a part of the model (`llm4msr.models.serving.PARTS`, or "all"), or why there is none."""

    part: str
    logit: float | None
    score: float | None
    reason: str | None = None


@dataclass(frozen=True)
class NearScenario:
    """Cosine of another scenario's vector with that of the one asked: as they are, and less their common mean."""

    name: str
    raw_similarity: float
    similarity: float


@dataclass(frozen=True)
class ScoreExplanation:
    """One score.

    Attributes:
        scenario: Its name.
        score: As of `Ranker.rank`.
        logit: The score before the sigmoid.
        without: The score without each part, and without all.
        user_level: How far the user's meta layers move the backbone's input x to h: |h - x| / |x|.
        scenario_level: The logit that the scenario's meta layers add.
        match: Cosine of user and item in knowledge space, standardised as the model reads them.
        scenarios: The other scenarios in knowledge space.
        scenarios_reason: Why these are absent.
        user: The user.
        item: The item.
    """

    scenario: str
    score: float
    logit: float
    without: list[Without]
    user_level: Measured
    scenario_level: Measured
    match: Measured
    scenarios: list[NearScenario]
    scenarios_reason: str | None
    user: UserFacts
    item: ItemFacts


def explain(
    ranker: Ranker, neighbours: Neighbours, user: Key, scenario: str, item: Key, context: Context | None = None
) -> ScoreExplanation:
    """Explains one score.

    Args:
        ranker: The model.
        neighbours: Who is near in its knowledge.
        user: Raw id.
        scenario: Its name.
        item: Raw id.
        context: Values of context features; those left out count as absent.

    Raises:
        RequestError: As of `Ranker.rank`.
    """
    score = ranker.rank(RankRequest(user, scenario, [item], context=context)).results[0].score
    model, knowledge = ranker.checkpoint.model, ranker.checkpoint.knowledge
    has = dict(zip(PARTS, (model.user_meta, model.scenario_meta, model.match, model.item_knowledge), strict=True))
    has["all"] = next((part for part in has.values() if part is not None), None)
    parts = _parts(ranker, user, scenario, [item], context)
    without = [
        Without(name, None, None, _NO_PART[name])
        if part is None
        else _without(name, _parts(ranker, user, scenario, [item], context, {*PARTS} if name == "all" else {name}))
        for name, part in has.items()
    ]
    user_facts, item_facts = describe_user(ranker, neighbours, user), describe_item(ranker, item)
    absent = {name: Measured(None, _NO_PART[name]) for name in PARTS}
    moved, own_logit, match = (absent[name] for name in PARTS[:3])
    if model.user_meta is not None:
        moved = Measured(float((parts.h_BD - parts.x_BD).norm() / parts.x_BD.norm().clamp(min=1e-12)))
    if parts.scenario_logit_B is not None:
        own_logit = Measured(float(parts.scenario_logit_B[0]))
    if model.match is not None and parts.match_B1 is not None:
        lacks = [facts for facts in (user_facts, item_facts) if not facts.knowledge_known]
        whom = "user" if lacks and lacks[0] is user_facts else "item"
        value = float(parts.match_B1[0, 0] * model.match.std + model.match.mean)
        match = Measured(None, f"the model has no knowledge of this {whom}") if lacks else Measured(value)
    scenarios, reason = _scenarios(knowledge, ranker.checkpoint.schema.scenario_names, scenario)
    logit = float(parts.logit_B[0])
    return ScoreExplanation(
        scenario, score, logit, without, moved, own_logit, match, scenarios, reason, user_facts, item_facts
    )


def scores_without_knowledge(
    ranker: Ranker, user: Key, scenario: str, items: Sequence[Key], context: Context | None = None
) -> np.ndarray:
    """Returns the score of each item without any part of the model that reads knowledge, in the order given, float64.

    Raises:
        RequestError: An id is of the wrong type for the data.
    """
    return torch.sigmoid(_parts(ranker, user, scenario, items, context, {*PARTS}).logit_B.double()).numpy()


def _parts(
    ranker: Ranker,
    user: Key,
    scenario: str,
    items: Sequence[Key],
    context: Context | None,
    without: Set[str] = frozenset(),
) -> Parts:
    """Scores candidates of a request as `Ranker.rank` does, and keeps the parts."""
    checkpoint, num_rows = ranker.checkpoint, len(items)
    user_row, item_row_N = int(ranker.user_rows([user], "user")[0]), ranker.item_rows(items, "items")
    index = checkpoint.schema.scenario_names.index(scenario)
    user_row_N, scenario_N = np.full((2, num_rows), [[user_row], [index]], np.int32)
    rows = ranker.rows(user_row_N, item_row_N, scenario_N, ranker.context(context or {}, num_rows))
    layers = ranker.user_layers(ranker.user_vector_row(user_row))
    return ranker.serving.parts(
        checkpoint.collator.features(rows), layers, ranker.vector_rows(item_row_N), index, without
    )


def _without(name: str, parts: Parts) -> Without:
    return Without(name, float(parts.logit_B[0]), float(torch.sigmoid(parts.logit_B[0].double())))


def _scenarios(
    table: KnowledgeTable | None, names: Sequence[str], scenario: str
) -> tuple[list[NearScenario], str | None]:
    if table is None:
        return [], NO_KNOWLEDGE
    if not table.scenarios_SK.any():
        return [], "scenarios were not extracted"
    own, mean_K = table.scenarios_SK[list(names).index(scenario)], table.scenarios_SK.mean(0)
    others = [
        NearScenario(name, round(cosine(own, other), 6), round(cosine(own - mean_K, other - mean_K), 6))
        for name, other in zip(names, table.scenarios_SK, strict=True)
        if name != scenario
    ]
    return others, None if others else "there is no other scenario"
