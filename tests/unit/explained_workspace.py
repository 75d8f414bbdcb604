"""A workspace whose vectors lie so that every similarity is known by hand.

Users are (100, x, y), their mean (100, 0, 0): A (10, 0), B (8, 6), C (0, -10), D (-18, 4). Hence cosines to A: B 0.8,
C 0, D -18 / sqrt(340). Scenarios are (50, 3, 0) and (50, -1, 0); items (-20, 0, 5), (-20, 5, 0), (-20, -5, -5).
"""

from __future__ import annotations

import numpy as np
from tiny import NUM_ITEMS, NUM_USERS, SEQUENCES, tiny_checkpoint, tiny_prepared

from llm4msr import storage
from llm4msr.config import KnowledgeConfig
from llm4msr.data.prepared import PreparedData
from llm4msr.knowledge.assemble import write_errors, write_table
from llm4msr.knowledge.engines.fitting import fit
from llm4msr.knowledge.engines.interface import EncodedBatch
from llm4msr.knowledge.plan import read_prompt_set
from llm4msr.knowledge.prompts import Liked, Prompt, item_prompt, prompts_table, user_prompt
from llm4msr.knowledge.store import KnowledgeStore, keys_to_arrow, prompt_keys
from llm4msr.knowledge.table import KnowledgeTable

IDENTITY = {"model": "by hand"}


def liked(*events: str) -> tuple[Liked, ...]:
    return (Liked("rec", len(events), 0, events),)


# (user row, prompt, vector or error); users 1001 and 1002 have one prompt between them.
USERS = [
    (1, user_prompt("1000", "24 years old", liked("green tea", "[bold]steel[/bold] pan")), (100, 10, 0)),
    (2, user_prompt("1001", "", liked("kettle")), (100, 8, 6)),
    (3, user_prompt("1002", "", liked("kettle")), (100, 8, 6)),
    (4, user_prompt("1003", "a cook", liked("mixer")), (100, 0, -10)),
    (5, user_prompt("1004", "", liked("broken")), "the tokenizer raised"),
    (6, user_prompt("1005", "", liked("fork")), (100, -18, 4)),
]
SCENARIOS = [
    (0, Prompt("scenario", "rec", "Scenario rec", (), "What?"), (50, 3, 0)),
    (1, Prompt("scenario", "search", "Scenario search", (), "What?"), (50, -1, 0)),
]
ITEMS = [
    (1, item_prompt("7000", "a tea"), (-20, 0, 5)),
    (2, item_prompt("7001", "a pan"), (-20, 5, 0)),
    (NUM_ITEMS, item_prompt(str(2**53 + 1), "a fork"), (-20, -5, -5)),
]


def letters(texts: list[str]) -> list[list[int]]:
    """A tokenizer whose tokens are the characters."""
    return [[ord(c) for c in text] for text in texts]


def write_prompts(uri: str, records: list[tuple]) -> None:
    prompts = [prompt for _, prompt, _ in records]
    keys = keys_to_arrow(prompt_keys(KnowledgeStore("unused", IDENTITY).identity_digest, prompts))
    storage.write_parquet(uri, prompts_table(prompts, [row for row, _, _ in records], keys))


def commit(store: KnowledgeStore, records: list[tuple], texts: bool, max_tokens: int) -> None:
    """Commits each distinct prompt once."""
    keys = prompt_keys(store.identity_digest, [prompt for _, prompt, _ in records])
    _, first = np.unique(keys, return_index=True)
    kept = [records[i] for i in sorted(first)]
    errors = tuple(v if isinstance(v, str) else None for _, _, v in kept)
    fitted = fit([prompt for _, prompt, _ in kept], letters, max_tokens)
    batch = EncodedBatch(
        np.array([(0, 0, 0) if error else v for (_, _, v), error in zip(kept, errors, strict=True)], np.float32),
        np.array([len(f.token_ids) for f in fitted], np.int32),
        np.array([f.num_dropped_events for f in fitted], np.int32),
        np.array([f.num_cut_characters for f in fitted], np.int32),
        errors,
        tuple(f"likes {prompt.subject_id}" if texts else None for _, prompt, _ in kept),
        np.full(len(kept), 7 if texts else 0, np.int32),
    )
    store.commit(keys[sorted(first)], batch)


def build(
    root: str,
    name: str = "k1",
    created_at: str = "2025-01-01T00:00:00+00:00",
    levels: tuple[str, ...] = ("scenario", "user"),
    texts: bool = True,
    max_tokens: int = 10_000,
    users: list[tuple] = USERS,
    prepared: PreparedData | None = None,
    preamble: str = "",
) -> None:
    """Writes what `jobs.prepare` and `jobs.extract` would have written."""
    if prepared is None:
        tiny_prepared(storage.join(root, "prepared", "data"), num_rows=40)
    uri = storage.join(root, "knowledge", name)
    store = KnowledgeStore(storage.join(root, "knowledge", "store"), IDENTITY)
    parts = {
        "scenarios.parquet": ("scenario", SCENARIOS),
        "bucket-00000.parquet": ("user", users[::2]),
        "bucket-00001.parquet": ("user", users[1::2]),
        "items-00000.parquet": ("item", ITEMS),
    }
    files = []
    for file, (level, records) in parts.items():
        if level in levels and records:
            write_prompts(storage.join(uri, "prompts", file), records)
            files.append({"file": file, "level": level, "num_prompts": len(records)})
    storage.write_manifest(storage.join(uri, "prompts"), {"files": files, "counts": {}})
    for level, records in (("user", users), ("scenario", SCENARIOS), ("item", ITEMS)):
        if level in levels:
            commit(store, records, texts, max_tokens)
    prompts = read_prompt_set([(storage.join(uri, "prompts", f["file"]), f["level"]) for f in files])
    index = store.index()
    write_table(uri, store, index, prompts, {"scenario": 2, "user": NUM_USERS, "item": NUM_ITEMS})
    write_errors(storage.join(uri, "errors.parquet"), index, prompts)
    manifest = {"kind": "knowledge", "prepared": "data", "levels": sorted(levels), "encoder": IDENTITY}
    config = KnowledgeConfig(preamble=preamble).model_dump(mode="json")
    storage.write_manifest(uri, manifest | {"created_at": created_at, "config": {"knowledge": config}})


def build_with_checkpoint(root: str) -> str:
    """Builds a workspace with a model that has histories and knowledge of all levels; returns its checkpoint."""
    levels = ("scenario", "user", "item")
    prepared = tiny_prepared(storage.join(root, "prepared", "data"), more=SEQUENCES)
    build(root, levels=levels, prepared=prepared)
    table = KnowledgeTable.load(storage.join(root, "knowledge", "k1"))
    tree = {"knowledge": {"levels": list(levels)}}
    return tiny_checkpoint(storage.join(root, "checkpoint"), prepared, table, **tree)
