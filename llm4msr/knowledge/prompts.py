"""Every word that the language model reads: one template per level, for all kinds of data.

Prompts quote what the training split says and nothing else; `llm4msr.knowledge.profiles` sees to that. Change
`PROMPT_VERSION` with any change of wording or of what is quoted: it is part of the encoder's identity, so old vectors
are not taken for new ones. The wording is our reconstruction; the paper's is not published.

What tells one subject from another stands early and in few words, because a sentence encoder reads about 256 tokens
and averages over all of them. Fitting a prompt to a model's limit is done in `llm4msr.knowledge.engines.fitting`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

PROMPT_VERSION = 3

Level = Literal["scenario", "user", "item"]

USER_TAIL = "Which interests does this show in each scenario, and which across scenarios?"
ITEM_TAIL = "What is it, and what interests does it serve?"
SCENARIO_TAIL = "What do these scenarios share, and how does {name} differ?"

KEY_BYTES = 16
KEY = pa.binary(KEY_BYTES)
# One prompt and what it is about. subject_row: user_row, item_row or scenario index. text: the uncut prompt.
# num_liked, last_liked_ms: of a user, all liked training rows and the time of the last. The columns after them are the
# prompt's parts, from which it is cut to a model's limit.
PROMPTS = pa.schema(
    [
        ("level", pa.string()),
        ("subject_id", pa.string()),
        ("subject_row", pa.int32()),
        ("key", KEY),
        ("text", pa.string()),
        ("num_events", pa.int32()),
        ("num_liked", pa.int32()),
        ("last_liked_ms", pa.int64()),
        ("head", pa.string()),
        ("sections", pa.list_(pa.string())),
        ("events", pa.list_(pa.string())),
        ("event_sections", pa.list_(pa.int32())),
        ("tail", pa.string()),
    ]
)
PARTS = ("level", "subject_id", "head", "sections", "events", "event_sections", "tail")


@dataclass(frozen=True)
class Prompt:
    """One prompt in parts, so that it can be made shorter without losing its instruction.

    Attributes:
        level: What it is about: a user, an item or a scenario.
        subject_id: Raw user or item id as text, or the scenario's name.
        head: Who or what it is about.
        events: What is quoted, the one to keep longest first: of a user the most recent over all sections, of a
            scenario rank by rank over the sections.
        tail: The instruction.
        sections: Lines between head and tail, in order of appearance; each lists its events.
        event_sections: For each event the section that lists it.
    """

    level: Level
    subject_id: str
    head: str
    events: tuple[str, ...]
    tail: str
    sections: tuple[str, ...] = ()
    event_sections: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Checks that every event has a section."""
        assert len(self.events) == len(self.event_sections), (self.events, self.event_sections)

    def text(self, num_events: int | None = None, body_characters: int | None = None) -> str:
        """Returns the prompt as the model reads it.

        Args:
            num_events: Quote the first so many events only; None for all.
            body_characters: Keep so many characters of what stands before the instruction; None for all.
        """
        listed: list[list[str]] = [[] for _ in self.sections]
        for place, event in list(zip(self.event_sections, self.events, strict=True))[:num_events]:
            listed[place].append(event)
        lines = [self.head] if self.head else []
        for section, events in zip(self.sections, listed, strict=True):
            lines.append(f"{section}: {'; '.join(events)}" if events else section)
        body = "\n".join(lines)[:body_characters]
        return f"{body}\n{self.tail}" if body else self.tail

    def content(self) -> str:
        """Returns all that decides the vector, cut or uncut, as one line of JSON."""
        parts = [self.head, self.sections, self.events, self.event_sections, self.tail]
        return json.dumps(parts, ensure_ascii=False, separators=(",", ":"))


@dataclass(frozen=True)
class Liked:
    """What a user liked in one scenario.

    Attributes:
        scenario: The scenario's name.
        num_rows: Liked training rows.
        num_untitled: How many of them are items without text.
        events: Item texts, most recent first, repeats merged.
        recency: Rank of each event in time, comparable over the scenarios of one user, smaller is more recent; where
            empty, an event's place in the list.
    """

    scenario: str
    num_rows: int
    num_untitled: int
    events: tuple[str, ...]
    recency: tuple[int, ...] = ()


def user_prompt(subject_id: str, user_text: str, liked: Sequence[Liked]) -> Prompt:
    """Returns the user-level prompt; dropping events from the end drops the oldest over all scenarios.

    Args:
        subject_id: Raw user id as text; not quoted.
        user_text: What is known of the user, such as "24 years old, male, technician"; may be empty.
        liked: Scenarios in which the user liked something, in the order of the schema.
    """
    sections = []
    for part in liked:
        untitled = f", {part.num_untitled} untitled" if part.num_untitled else ""
        sections.append(f"Liked in {part.scenario} ({part.num_rows}{untitled})")
    events, event_sections = _merge(
        [part.events for part in liked], [part.recency or range(len(part.events)) for part in liked]
    )
    head = f"User: {user_text.rstrip('.')}." if user_text else ""
    return Prompt("user", subject_id, head, events, USER_TAIL, tuple(sections), event_sections)


def item_prompt(subject_id: str, text: str) -> Prompt:
    """Returns the item-level prompt. It quotes nothing of the logs, so items never seen in training have one too.

    Args:
        subject_id: Raw item id as text; not quoted.
        text: What is known of the item, such as its title; not empty.
    """
    return Prompt("item", subject_id, f"Item: {text.rstrip('.')}.", (), ITEM_TAIL)


@dataclass(frozen=True)
class ScenarioFacts:
    """What the training rows say about one scenario.

    Attributes:
        name: As in the schema.
        description: As in the schema.
        num_rows: Interactions.
        num_positive: Interactions with label 1; None where only those are counted, so that a share says nothing.
        num_users: Users with at least one interaction.
        num_items: Items with at least one interaction.
        shared_users: For each scenario of the schema, users that interacted in both.
        most_liked: Texts of the items with most positives, most liked first.
    """

    name: str
    description: str
    num_rows: int
    num_positive: int | None
    num_users: int
    num_items: int
    shared_users: tuple[int, ...]
    most_liked: tuple[str, ...]


def scenario_prompt(index: int, facts: Sequence[ScenarioFacts]) -> Prompt:
    """Returns the scenario-level prompt of ``facts[index]``: its own facts first, then what the others are like."""
    own = facts[index]
    lines = [f"Scenario {own.name}: {own.description.rstrip('.')}. {_statistics(own)}."]
    for other_index, other in enumerate(facts):
        if other_index != index:
            shared = f"{_percent(own.shared_users[other_index], own.num_users)} of {own.name}'s users are here too"
            lines.append(
                f"Other scenario {other.name}: {other.description.rstrip('.')}. {_statistics(other)}; {shared}."
            )
    order = [index, *(i for i in range(len(facts)) if i != index)]
    most_liked = [facts[i].most_liked for i in order]
    events, event_sections = _merge(most_liked, [range(len(texts)) for texts in most_liked])
    return Prompt(
        level="scenario",
        subject_id=own.name,
        head="\n".join(lines),
        events=events,
        tail=SCENARIO_TAIL.format(name=own.name),
        sections=tuple(f"Most liked in {facts[i].name}" for i in order),
        event_sections=event_sections,
    )


def prompts_table(
    prompts: Sequence[Prompt],
    rows: Sequence[int],
    keys: pa.Array,
    num_liked: Sequence[int] | None = None,
    last_liked_ms: Sequence[int | None] | None = None,
) -> pa.Table:
    """Returns prompts as a table of schema `PROMPTS`.

    Args:
        prompts: The prompts.
        rows: user_row, item_row or scenario index of each.
        keys: Key in the knowledge store of each, type `KEY`.
        num_liked: Of users: liked training rows of each.
        last_liked_ms: Of users: time of the last of them, None without times.
    """
    columns: dict[str, Any] = {name: [getattr(p, name) for p in prompts] for name in PARTS}
    columns |= {
        "subject_row": list(rows),
        "key": keys,
        "text": [p.text() for p in prompts],
        "num_events": [len(p.events) for p in prompts],
        "num_liked": list(num_liked) if num_liked is not None else [0] * len(prompts),
        "last_liked_ms": list(last_liked_ms) if last_liked_ms is not None else [None] * len(prompts),
    }
    return pa.table(columns, schema=PROMPTS)


def prompts_from_table(table: pa.Table) -> list[Prompt]:
    """Rebuilds the prompts of a table that has the columns `PARTS`."""
    return [
        Prompt(
            row["level"],
            row["subject_id"],
            row["head"],
            tuple(row["events"]),
            row["tail"],
            tuple(row["sections"]),
            tuple(row["event_sections"]),
        )
        for row in table.select(PARTS).to_pylist()
    ]


def _merge(lists: Sequence[Sequence[str]], ranks: Sequence[Sequence[int]]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Merges lists by the rank of their texts, equal ranks in the order of the lists; returns texts and their lists."""
    ranked = sorted(
        (
            (rank, section, text)
            for section, (texts, of_texts) in enumerate(zip(lists, ranks, strict=True))
            for text, rank in zip(texts, of_texts, strict=True)
        ),
        key=lambda entry: entry[:2],
    )
    return tuple(text for _, _, text in ranked), tuple(section for _, section, _ in ranked)


def _statistics(facts: ScenarioFacts) -> str:
    share = "" if facts.num_positive is None else f"{_percent(facts.num_positive, facts.num_rows)} positive, "
    return f"{facts.num_rows} interactions, {share}{facts.num_users} users, {facts.num_items} items"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "0.0%"
