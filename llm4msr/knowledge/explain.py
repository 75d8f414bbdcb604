"""What the language model was told of a subject, what it made of it, and who is near in knowledge space.

This is the method's interpretability: the prompt, the model's own words where `knowledge.generate` was on, and the
nearest users, items and scenarios, all read from a finished extraction; no model runs. What "near" means is said in
`llm4msr.knowledge.nearest`. Nothing is printed here; see `jobs.explain`.

Axes: N rows of users or items, S scenarios, K knowledge width, M rows that were found.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llm4msr import storage
from llm4msr.knowledge import place
from llm4msr.knowledge.extraction import Extraction
from llm4msr.knowledge.nearest import cosine, mean_vector, nearest_rows
from llm4msr.knowledge.prompts import PARTS, Level, Prompt, prompts_from_table
from llm4msr.knowledge.store import COUNTS, keys_to_numpy
from llm4msr.knowledge.table import KnowledgeTable

MAX_IDS = 10
_NO_PROMPT = {
    "user": "no liked training row, so there is no prompt",
    "item": "no text, so there is no prompt",
    "scenario": "no prompt",
}
_SIMILARITY = (
    "similarity is the cosine after the mean of its level is taken from each vector, because the states of a language "
    "model share one large direction; raw similarity is the cosine without that"
)


class UnknownSubjectError(ValueError):
    """A user, item or scenario that the data does not have; the message names some that it has."""


@dataclass(frozen=True)
class Neighbour:
    """One vector near the subject's. Identical prompts share one, so it may belong to several users or items.

    Attributes:
        ids: Raw ids as text, in order of table rows; the first `MAX_IDS` of them.
        num_ids: How many there are.
        similarity: Cosine of the vectors, each less the mean of its level; -1 to 1.
        raw_similarity: Cosine of the vectors as they are.
        first_line: First line of the prompt; empty where there is none.
    """

    ids: tuple[str, ...]
    num_ids: int
    similarity: float
    raw_similarity: float
    first_line: str


@dataclass(frozen=True)
class ScenarioSimilarity:
    """How near a scenario is; similarities as of `Neighbour`."""

    name: str
    similarity: float
    raw_similarity: float


@dataclass(frozen=True)
class Explanation:
    """All that is known of one user, item or scenario. Ids are text whatever their type, None is null in JSON.

    Attributes:
        knowledge: Name of the knowledge directory.
        created_at: When it was finished, ISO 8601.
        chosen: Why this one: "the only one", "the newest of 3" or "as asked".
        prepared: Name of the prepared data behind it.
        model: `knowledge.model` of the extraction.
        level: "user", "item" or "scenario".
        subject_id: Raw id as text, or the scenario's name.
        text: What the prepared data say: the entity's text, maybe empty, or the scenario's description.
        num_train_rows: Training rows of the user or item; None for a scenario.
        preamble: Text that the model read before every prompt; "" without.
        prompt: The uncut prompt; None where there is none.
        prompt_read: The prompt within the model's limit, as it was read; None where no vector came of it.
        num_tokens: Length of what was read, special tokens included; None as above, likewise the counts below.
        num_dropped_events: Events left out to keep the limit, the oldest ones.
        num_cut_characters: Characters cut from what stands before the instruction.
        generated_text: The model's answer; None where it was not asked to write.
        num_generated_tokens: Length of the answer; 0 where it was not asked to write.
        has_knowledge: Whether there is a vector.
        reason: Why there is none; None where there is one.
        nearest_users: The nearest other users, nearest first; empty without a vector.
        nearest_items: The nearest other items; empty where items were not extracted.
        scenarios: The other scenarios in the order of the schema; empty where scenarios were not extracted.
        notes: What to know when reading the above, as sentences.
    """

    knowledge: str
    created_at: str
    chosen: str
    prepared: str
    model: str
    level: Level
    subject_id: str
    text: str
    num_train_rows: int | None
    preamble: str
    prompt: str | None
    prompt_read: str | None
    num_tokens: int | None
    num_dropped_events: int | None
    num_cut_characters: int | None
    generated_text: str | None
    num_generated_tokens: int | None
    has_knowledge: bool
    reason: str | None
    nearest_users: tuple[Neighbour, ...]
    nearest_items: tuple[Neighbour, ...]
    scenarios: tuple[ScenarioSimilarity, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns the fields by name, in this order, with neighbours and scenarios as objects."""
        return asdict(self)


def explain(extraction: Extraction, level: Level, subject_id: str, num_neighbours: int = 5) -> Explanation:
    """Explains one user, item or scenario.

    Args:
        extraction: Where to look.
        level: What `subject_id` names.
        subject_id: Raw id as text, or a scenario's name.
        num_neighbours: Users, and items, to list.

    Raises:
        UnknownSubjectError: The data has no such subject.
        StorageError: A file is missing or damaged.
    """
    manifest = extraction.manifest
    row, subject = _subject(extraction, level, subject_id)
    spaces = _spaces(extraction.table)
    at = int(spaces[level].index_N[row])
    has_knowledge = level in manifest["levels"] and at >= spaces[level].first_row
    reading, notes = _reading(extraction, level, row, has_knowledge)
    nearest: dict[Level, tuple[Neighbour, ...]] = {"user": (), "item": ()}
    scenarios: tuple[ScenarioSimilarity, ...] = ()
    if has_knowledge:
        notes.append(_SIMILARITY)
        vector_K = spaces[level].vectors_NK[at].astype(np.float32)
        centred_K = vector_K - spaces[level].mean_K
        if not centred_K.any():
            notes.append(f"its vector is the mean of all {level}s: it is equally near to everything")
        for of in nearest:
            own_row = row if of == level else 0
            nearest[of] = _neighbours(extraction, of, spaces[of], vector_K, centred_K, num_neighbours, own_row)
        if "scenario" in manifest["levels"]:
            own_index = row if level == "scenario" else None
            scenarios = _scenarios(extraction, spaces["scenario"], vector_K, centred_K, own_index)
            if len(spaces["scenario"].vectors_NK) == 2:
                notes.append("two scenarios lie opposite each other once their mean is taken away")
    return Explanation(
        knowledge=extraction.uri.rsplit("/", 1)[-1],
        created_at=manifest["created_at"],
        chosen=extraction.chosen,
        prepared=manifest["prepared"],
        model=manifest["config"]["knowledge"]["model"],
        level=level,
        **subject,
        preamble=manifest["config"]["knowledge"]["preamble"],
        **reading,
        has_knowledge=has_knowledge,
        nearest_users=nearest["user"],
        nearest_items=nearest["item"],
        scenarios=scenarios,
        notes=tuple(notes),
    )


def _subject(extraction: Extraction, level: Level, subject_id: str) -> tuple[int, dict[str, Any]]:
    """Returns the table row, or the index of a scenario, and the first fields of the explanation."""
    if level == "scenario":
        scenarios = extraction.prepared.schema.scenarios
        for index, scenario in enumerate(scenarios):
            if scenario.name == subject_id:
                return index, {"subject_id": subject_id, "text": scenario.description, "num_train_rows": None}
        raise UnknownSubjectError(f"no scenario {subject_id!r}; the data has {[s.name for s in scenarios]}")
    table = extraction.entities(level, ["key", "text", "num_train_rows"])
    keys = table["key"]
    try:
        key = pa.scalar(subject_id).cast(keys.type)
    except ValueError as error:
        raise UnknownSubjectError(
            f"{subject_id!r} is no {level} id of this data: they are {keys.type}, such as {_listed(keys[:4])}"
        ) from error
    at = pc.index(keys, key).as_py()
    if at < 0:
        near = min(pc.sum(pc.less(keys, key)).as_py() or 0, len(keys) - 2) - 2
        raise UnknownSubjectError(
            f"no {level} {subject_id!r} in {extraction.prepared.uri}; the nearest ids are "
            f"{_listed(keys.slice(max(near, 0), 4))}"
        )
    record = table.slice(at, 1).to_pylist()[0]
    subject = {"subject_id": str(record["key"]), "text": record["text"], "num_train_rows": record["num_train_rows"]}
    return at + 1, subject


def _listed(keys: pa.ChunkedArray) -> str:
    return ", ".join(str(key) for key in keys.to_pylist())


def _reading(extraction: Extraction, level: Level, row: int, has_knowledge: bool) -> tuple[dict[str, Any], list[str]]:
    """Returns the explanation's fields from `prompt` to `reason`, and notes."""
    fields: dict[str, Any] = dict.fromkeys(("prompt", "prompt_read", *COUNTS, "generated_text", "reason"))
    if level == "user" and extraction.manifest.get("user_vectors") == "items":
        reason = None if has_knowledge else "no liked training row of an item with knowledge"
        return fields | {"reason": reason}, ["the vector is the mean of those of the items that the user liked"]
    if level not in extraction.manifest["levels"]:
        levels = ", ".join(extraction.manifest["levels"])
        return fields | {"reason": f"not extracted: knowledge.levels was {levels}"}, []
    found = extraction.prompts(level, [row], ["key", "text", *PARTS]).get(row)
    if found is None:
        return fields | {"reason": _NO_PROMPT[level]}, []
    fields["prompt"] = found["text"][0].as_py()
    if not has_knowledge:
        errors = storage.read_parquet(storage.join(extraction.uri, place.ERRORS_FILE))
        own = pc.and_(pc.equal(errors["level"], level), pc.equal(errors["subject_row"], row))
        return fields | {"reason": next(iter(errors.filter(own)["error"].to_pylist()), "never encoded")}, []
    index = extraction.store.index()
    position_1 = index.find(keys_to_numpy(found["key"]))
    if position_1[0] < 0:
        note = f"{extraction.store.uri} no longer has this prompt, so what was read and written is not known"
        return fields, [note]
    stored = extraction.store.columns(index, position_1, ["text", *COUNTS]).to_pylist()[0]
    fields |= {name: stored[name] for name in COUNTS} | {"generated_text": stored["text"]}
    prompt = prompts_from_table(found)[0]
    fields["prompt_read"] = _as_read(prompt, stored["num_dropped_events"], stored["num_cut_characters"])
    return fields, []


def _as_read(prompt: Prompt, num_dropped_events: int, num_cut_characters: int) -> str:
    """Returns the prompt as `llm4msr.knowledge.engines.fitting` cut it."""
    num_events = len(prompt.events) - num_dropped_events
    if not num_cut_characters:
        return prompt.text(num_events)
    num_characters = len(prompt.text(num_events)) - len(prompt.tail) - 1
    return prompt.text(num_events, num_characters - num_cut_characters)


@dataclass(frozen=True)
class _Space:
    """The vectors of one level.

    Attributes:
        vectors_NK: The vectors.
        index_N: int32; the vector of each user row, item row or scenario.
        first_row: 1 where row 0 of `vectors_NK` means "no knowledge", else 0.
    """

    vectors_NK: np.ndarray
    index_N: np.ndarray
    first_row: int

    @cached_property
    def mean_K(self) -> np.ndarray:
        """Mean of the vectors, float32."""
        return mean_vector(self.vectors_NK, self.first_row)


def _spaces(table: KnowledgeTable) -> dict[str, _Space]:
    scenario_index_S = np.arange(len(table.scenarios_SK), dtype=np.int32)
    return {
        "user": _Space(table.users_NK, table.user_index_N, first_row=1),
        "item": _Space(table.items_NK, table.item_index_N, first_row=1),
        "scenario": _Space(table.scenarios_SK, scenario_index_S, first_row=0),
    }


def _neighbours(
    extraction: Extraction,
    level: Level,
    space: _Space,
    vector_K: np.ndarray,
    centred_K: np.ndarray,
    num: int,
    own_row: int,
) -> tuple[Neighbour, ...]:
    """Returns the nearest users or items; `own_row` is the subject's table row, 0 where it is of another level."""
    own = int(space.index_N[own_row])
    is_shared = np.count_nonzero(space.index_N == own) > 1  # others with the very same vector are the nearest
    found = nearest_rows(space.vectors_NK, space.mean_K, centred_K, num, without_row=0 if is_shared else own)
    if not found:
        return ()
    entity_M = np.flatnonzero(np.isin(space.index_N, [at for at, _ in found]))
    entity_M = entity_M[entity_M != own_row]
    owners = [entity_M[space.index_N[entity_M] == at] for at, _ in found]
    keys = extraction.entities(level, ["key"])["key"]
    prompts = extraction.prompts(level, [int(rows[0]) for rows in owners], ["text"])
    texts = {row: table["text"][0].as_py() for row, table in prompts.items()}
    return tuple(
        Neighbour(
            ids=tuple(str(key) for key in keys.take(rows[:MAX_IDS] - 1).to_pylist()),
            num_ids=len(rows),
            similarity=_rounded(similarity),
            raw_similarity=_rounded(cosine(space.vectors_NK[at].astype(np.float32), vector_K)),
            first_line=texts.get(int(rows[0]), "").split("\n", 1)[0],
        )
        for (at, similarity), rows in zip(found, owners, strict=True)
    )


def _scenarios(
    extraction: Extraction, space: _Space, vector_K: np.ndarray, centred_K: np.ndarray, own_index: int | None
) -> tuple[ScenarioSimilarity, ...]:
    return tuple(
        ScenarioSimilarity(
            name,
            _rounded(cosine(space.vectors_NK[index] - space.mean_K, centred_K)),
            _rounded(cosine(space.vectors_NK[index], vector_K)),
        )
        for index, name in enumerate(extraction.prepared.schema.scenario_names)
        if index != own_index
    )


def _rounded(similarity: float) -> float:
    return round(min(max(similarity, -1.0), 1.0), 6)
