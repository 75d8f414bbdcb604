"""What a batch consists of: its rows, cut into units of work, and what tells it from another batch. No Ray.

A unit is a range of rows of one file of the input; its scores are one file. Units follow from the input and from the
number of rows per unit, which the plan of a batch keeps: the same command after a crash cuts the same units.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.types as pt

from llm4msr import storage
from llm4msr.config import Config, ConfigError, ScoreConfig, digest
from llm4msr.data.prepared import ITEMS_FILE, SCHEMA_FILE, USERS_FILE
from llm4msr.data.source import DataError
from llm4msr.request import Key
from llm4msr.schema import FeatureSchema
from llm4msr.workspace import reported_checkpoint_uri, scores_root

Kind = Literal["lists", "pairs", "users"]

# Part of what a batch is: raise it when the same input would give other files.
SCORE_VERSION = 1
PLAN_FILE = "plan.json"
REQUESTS_AT_ONCE = 16
# Of one unit, where score.rows_per_commit is auto: candidates, and rows at most and at least. Lists are not measured
# before they are read.
CANDIDATES_PER_UNIT = 1 << 22
MOST_ROWS = {"lists": 4096, "pairs": 1 << 20, "users": 4096}
FEWEST_ROWS = {"lists": 64, "pairs": 4096, "users": 1}
UNITS_PER_ACTOR = 4  # so that all have work until the end

UNITS = pa.schema(
    [
        ("unit", pa.int64()),
        ("file", pa.string()),
        ("first", pa.int64()),  # row of the file
        ("num_rows", pa.int64()),
        ("row", pa.int64()),  # number of the first row among all rows of the input
    ]
)


@dataclass(frozen=True)
class Model:
    """What is known of a checkpoint before it is loaded.

    Attributes:
        uri: Where it lies.
        version: Its model_version.
        digest: Of its metadata: no other training has the same.
        schema: Features and scenarios.
        num_items: Items of its table.
    """

    uri: str
    version: str
    digest: str
    schema: FeatureSchema
    num_items: int


@dataclass(frozen=True)
class Input:
    """The rows of a batch.

    Attributes:
        kind: What a row is.
        files: URIs, in order.
        num_rows: Rows of each file.
        columns: Those that are read.
    """

    kind: Kind
    files: tuple[str, ...]
    num_rows: tuple[int, ...]
    columns: tuple[str, ...]


def open_model(config: Config) -> Model:
    """Finds the checkpoint that scores.

    Raises:
        StorageError: It is missing or unfinished, or the workspace's report names none.
    """
    given = config.score.checkpoint_uri
    uri = reported_checkpoint_uri(config.workspace_uri) if given is None else storage.absolute(given)
    manifest = storage.read_manifest(uri, "a checkpoint is written by jobs.train")
    if manifest.get("kind") != "checkpoint":
        raise storage.StorageError(f"{uri}: a {manifest.get('kind')!r} directory, not a checkpoint")
    metadata = storage.read_json(storage.join(uri, "metadata.json"))
    schema = FeatureSchema.from_json(storage.read_json(storage.join(uri, SCHEMA_FILE)))
    num_items = storage.parquet_metadata(storage.join(uri, ITEMS_FILE)).num_rows
    return Model(uri, metadata["model_version"], digest(metadata), schema, num_items)


def open_input(settings: ScoreConfig, model: Model) -> Input:
    """Finds the rows of a batch, and checks their columns.

    Raises:
        StorageError: Nothing is there, or a file is damaged.
        DataError: A column is missing or of another type, or there are no rows.
    """
    given = settings.input_uri or settings.users_uri
    root = storage.join(model.uri, USERS_FILE) if given is None else storage.absolute(given)
    files = [uri for uri, _ in storage.list_files(root, ".parquet")]
    if not files:
        raise storage.StorageError(f"{root}: no Parquet file there (their names end with .parquet)")
    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
        footers = list(pool.map(storage.parquet_metadata, files))
    schemas = [footer.schema.to_arrow_schema() for footer in footers]
    kind: Kind
    if given is None:
        kind, columns = "users", ["key"]
    elif settings.input_uri is None:
        kind, columns = "users", ["user"]
    else:
        kind, columns = _columns(files[0], schemas[0])
    for file, found in zip(files, schemas, strict=True):
        _check(file, kind, columns, found, model.schema)
    if not sum(footer.num_rows for footer in footers):
        raise DataError(f"{root}: no rows in its {len(files)} files")
    return Input(kind, tuple(files), tuple(footer.num_rows for footer in footers), tuple(columns))


def _columns(file: str, found: pa.Schema) -> tuple[Kind, list[str]]:
    kinds = [name for name in ("items", "item") if name in found.names]
    if len(kinds) != 1:
        raise DataError(
            f"{file}: {'both columns items and item' if kinds else 'neither column items nor item'}: give lists (user, "
            f"scenario, items) or pairs (user, scenario, item); found: {', '.join(found.names)}"
        )
    optional = ("top_k", "context") if kinds == ["items"] else ("context",)
    columns = ["user", "scenario", *kinds, *(name for name in optional if name in found.names)]
    return ("lists" if kinds == ["items"] else "pairs"), columns


def _check(file: str, kind: Kind, columns: Sequence[str], found: pa.Schema, schema: FeatureSchema) -> None:
    if missing := [name for name in columns if name not in found.names]:
        raise DataError(f"{file}: no column {missing[0]!r}; {kind} need {columns}, found: {', '.join(found.names)}")
    types = {name: found.field(name).type for name in columns}
    items = types.get("items", pa.list_(pa.null()))
    if not (pt.is_list(items) or pt.is_large_list(items) or pt.is_fixed_size_list(items)):
        raise DataError(f"{file}: column items is {items}: a list of item ids is needed")
    if not pt.is_integer(types.get("top_k", pa.int64())):
        raise DataError(f"{file}: column top_k is {types['top_k']}: whole numbers are needed")
    context = types.get("context", pa.struct([]))
    if not pt.is_struct(context):
        raise DataError(f"{file}: column context is {context}: a struct of context features is needed")
    valid = [f.name for f in schema.features if f.source == "context"]
    if unknown := [one.name for one in context if one.name not in valid]:
        names = ", ".join(valid) or "this model has none"
        raise DataError(f"{file}: context has {unknown[0]!r}, no context feature; valid: {names}")


def read_candidates(uri: str, schema: FeatureSchema) -> list[Key]:
    """Reads the items that are ranked, each once: a JSON list, or column item of a Parquet file or folder.

    Raises:
        StorageError: The file is missing or damaged, or lacks the column.
        DataError: It holds no items, or ids of another type.
    """
    if uri.endswith(".json"):
        items = storage.read_json(uri)
        if not isinstance(items, list):
            raise DataError(f"{uri}: a JSON list of item ids is needed")
    else:
        items = storage.read_parquet(uri, ["item"])["item"].to_pylist()
    wanted = int if schema.item_key_type == "int64" else str
    for place, item in enumerate(items):
        if type(item) is not wanted:
            kind = "whole numbers" if wanted is int else "text"
            raise DataError(f"{uri}: item {place} is {item!r}: ids of this checkpoint are {kind}")
    if not items:
        raise DataError(f"{uri}: no items in it")
    return list(dict.fromkeys(items))


def chosen_scenarios(settings: ScoreConfig, schema: FeatureSchema) -> tuple[str, ...]:
    """Returns the scenarios that users are scored in.

    Raises:
        ConfigError: One is unknown.
    """
    for name in settings.scenarios:
        if name not in schema.scenario_names:
            valid = ", ".join(schema.scenario_names)
            raise ConfigError(f"score.scenarios: the checkpoint has no scenario {name!r}; valid: {valid}")
    return settings.scenarios or schema.scenario_names


def identify(settings: ScoreConfig, model: Model, rows: Input) -> dict[str, Any]:
    """Returns what tells this batch from any other, as JSON has it."""
    given = settings.input_uri or settings.users_uri
    root = given and storage.absolute(given)
    identity: dict[str, Any] = {
        "version": SCORE_VERSION,
        "model_version": model.version,
        "model_digest": model.digest,
        "kind": rows.kind,
        # The checkpoint's own users are known by its digest.
        "files": root
        and dict(zip((uri.removeprefix(root) for uri in rows.files), _fingerprints(rows.files), strict=True)),
    }
    if rows.kind == "users":
        candidates = settings.candidates_uri and storage.absolute(settings.candidates_uri)
        identity |= {
            "scenarios": chosen_scenarios(settings, model.schema),
            "top_k": settings.top_k,
            "candidates": candidates and _fingerprints([uri for uri, _ in storage.list_files(candidates)]),
        }
    plain: dict[str, Any] = json.loads(json.dumps(identity))
    return plain


def _fingerprints(uris: Sequence[str]) -> list[dict[str, Any]]:
    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
        return list(pool.map(storage.fingerprint, uris))


def open_plan(config: Config, model: Model, rows: Input, rows_per_unit: int) -> tuple[str, dict[str, Any]]:
    """Returns where the scores go, and the plan that lies there or is written there now.

    Args:
        config: Names the place, or leaves it to what is scored.
        model: What scores.
        rows: What is scored.
        rows_per_unit: Of a new plan; one that lies there keeps its own.

    Returns:
        URI, and a tree of `identity` and `rows_per_unit`.

    Raises:
        ConfigError: Something else lies there.
    """
    identity = identify(config.score, model, rows)
    given = config.score.output_uri
    uri = storage.join(scores_root(config), digest(identity)) if given is None else storage.absolute(given)
    place = storage.join(uri, PLAN_FILE)
    if storage.exists(place):
        plan = storage.read_json(place)
        for key in identity | plan["identity"]:
            found, wanted = plan["identity"].get(key), identity.get(key)
            if found != wanted:
                raise ConfigError(
                    f"score.output_uri {uri} holds other scores: their {key} is {_short(found)}, now it is "
                    f"{_short(wanted)}; "
                    "give another place, or remove it"
                )
        return uri, plan
    if left := storage.list_files(uri):
        raise ConfigError(f"score.output_uri {uri} holds other files, such as {left[0][0]}: give a place of its own")
    plan = {"identity": identity, "rows_per_unit": rows_per_unit}
    storage.write_json(place, plan)
    return uri, plan


def _short(value: Any) -> str:
    return textwrap.shorten(str(value), 200, placeholder=" ...")


def choose_rows_per_unit(settings: ScoreConfig, rows: Input, candidates_per_row: int, num_actors: int) -> int:
    """Returns how many rows a unit has: some ten seconds' work, less in a small batch that many actors share."""
    if settings.rows_per_commit != "auto":
        return settings.rows_per_commit
    most = max(min(MOST_ROWS[rows.kind], CANDIDATES_PER_UNIT // candidates_per_row), 1)
    shared_out = -(-sum(rows.num_rows) // (UNITS_PER_ACTOR * num_actors))
    return min(most, max(FEWEST_ROWS[rows.kind], shared_out))


def cut_units(rows: Input, rows_per_unit: int) -> pa.Table:
    """Returns a table `UNITS`."""
    units: list[dict[str, Any]] = []
    starts = np.cumsum([0, *rows.num_rows]).tolist()
    for file, num_rows, start in zip(rows.files, rows.num_rows, starts, strict=False):
        for first in range(0, num_rows, rows_per_unit):
            units.append(
                {
                    "unit": len(units),
                    "file": file,
                    "first": first,
                    "num_rows": min(rows_per_unit, num_rows - first),
                    "row": start + first,
                }
            )
    return pa.Table.from_pylist(units, UNITS)
