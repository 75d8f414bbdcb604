"""Where the user's own tables lie and which columns of them are read, for which use.

`TableLayout` answers this from the configuration and the files' headers alone; `llm4msr.data.table` reads the rows.
"""

from __future__ import annotations

from llm4msr import storage
from llm4msr.config import DataConfig
from llm4msr.data.columns import Use, check_type, is_key_integer
from llm4msr.data.csv import LINE, RAW
from llm4msr.data.source import DataError, Shard
from llm4msr.data.tabular import SUFFIXES, column_types, nearest
from llm4msr.schema import KeyType, events_schema

ROLE_OF = {"user": "users", "item": "items", "context": "events"}

_USE: dict[str, Use] = {"categorical": "categorical", "numeric": "numeric", "text": "words", "sequence": "sequence"}
# Columns that the prepared tables and batches have beside the features.
_RESERVED = {*events_schema("int64", "int64").names, "row_id", "user_row", "item_row", "key", "text", "num_train_rows"}
_NAMES_SHOWN = 40


class TableLayout:
    """Files and columns by role: events, users, items.

    Args:
        config: ``data`` section with kind = table.

    Raises:
        DataError: A column's or feature's name cannot be used, or two features share one.
    """

    def __init__(self, config: DataConfig) -> None:
        assert config.raw_uri is not None, "the configuration asks for raw_uri"
        self._raw_uri = storage.absolute(config.raw_uri)
        table = config.table
        self._names = {"events": table.interactions, "users": table.users, "items": table.items}
        self._wanted = _wanted_columns(config)
        names = [f.name for f in table.features]
        for name in names:
            if name in _RESERVED:
                raise DataError(
                    f"data.table.features: a feature cannot be named {name!r}, which the prepared tables use "
                    f"themselves, as they do {sorted(_RESERVED)}; rename the column in the file"
                )
            if names.count(name) > 1:
                raise DataError(
                    f"data.table.features: {name!r} is named {names.count(name)} times; names must differ over users,"
                    " items and interactions: rename the column in one of the files"
                )
        for role, wanted in self._wanted.items():
            if taken := sorted({LINE, RAW} & set(wanted)):
                raise DataError(f"data.table: no column of {role} may be named {taken[0]!r}; rename it in the file")

    def columns(self, role: str) -> list[str]:
        """Returns the columns to read of one kind of file, each once."""
        return list(self._wanted[role])

    def files(self, role: str) -> list[Shard]:
        """Lists the files of one kind, sorted by name; empty where none is configured.

        Raises:
            DataError: It is configured and nothing readable is there, or a name is there in two formats.
        """
        name = self._names[role]
        if name is None:
            return []
        uri = storage.join(self._raw_uri, name)
        found = storage.list_files(uri, SUFFIXES)
        if not found:
            setting = {"events": "interactions"}.get(role, role)
            prefix = len(self._raw_uri.rstrip("/")) + 1
            there = [path[prefix:] for path, _ in storage.list_files(self._raw_uri)]
            raise DataError(
                f"{uri}: no {', '.join(SUFFIXES)} file there (data.table.{setting} = {name!r}); "
                f"{self._raw_uri} holds {there[:_NAMES_SHOWN]}.{nearest(name, there)}"
            )
        stems = [path.removesuffix(next(filter(path.endswith, SUFFIXES))) for path, _ in found]
        if twice := sorted(path for (path, _), stem in zip(found, stems, strict=True) if stems.count(stem) > 1):
            raise DataError(f"{twice} would be read twice: keep one file of each name")
        return [Shard(path, role, size) for path, size in found]

    def check_columns(self, shard: Shard) -> None:
        """Checks that a file has the columns that its role needs, with types that can be read.

        Raises:
            DataError: It has not; names the columns found, and the nearest one.
        """
        found = column_types(shard.uri)
        for name, uses in self._wanted[shard.role].items():
            if name not in found:
                raise DataError(
                    f"{shard.uri}: no column {name!r} (data.{uses[0][1]}); found {list(found)[:_NAMES_SHOWN]}."
                    f"{nearest(name, list(found))}"
                )
            for use, _ in uses:
                check_type(shard.uri, name, found[name], use)

    def key_type(self, column: str, roles: tuple[str, ...]) -> KeyType:
        """Returns int64 where a column is of integers in every file of the roles, else string."""
        integer = True
        for shard in [shard for role in roles for shard in self.files(role)]:
            self.check_columns(shard)
            integer = integer and is_key_integer(column_types(shard.uri)[column])
        return "int64" if integer else "string"


def _wanted_columns(config: DataConfig) -> dict[str, dict[str, list[tuple[Use, str]]]]:
    """Returns {role: {column: [(use, setting that names it)]}}."""
    table = config.table
    time: Use = "iso" if table.timestamp_unit == "iso" else "time"
    named: list[tuple[str, str | None, Use, str]] = [
        ("events", table.user_column, "key", "table.user_column"),
        ("events", table.item_column, "key", "table.item_column"),
        ("events", table.scenario_column, "categorical", "table.scenario_column"),
        ("events", table.label_column, "label", "table.label_column"),
        ("events", table.rating_column, "numeric", "table.rating_column"),
        ("events", table.timestamp_column, time, "table.timestamp_column"),
        ("events", table.position_column, "numeric", "table.position_column"),
        ("events", config.split.column, "split", "split.column"),
        ("users", table.user_column, "key", "table.user_column"),
        *(("users", name, "text", "table.user_text_columns") for name in table.user_text_columns),
        ("items", table.item_column, "key", "table.item_column"),
        ("items", table.item_scenario_column, "categorical", "table.item_scenario_column"),
        *(("items", name, "text", "table.item_text_columns") for name in table.item_text_columns),
        *((ROLE_OF[f.source], f.name, _USE[f.kind], "table.features") for f in table.features),
    ]
    wanted: dict[str, dict[str, list[tuple[Use, str]]]] = {"events": {}, "users": {}, "items": {}}
    for role, column, use, setting in named:
        if column:
            wanted[role].setdefault(column, []).append((use, setting))
    return wanted
