"""Reads unit costs: figures of benchmarks' results where there are any, assumptions with their reasons where not.

``unit_costs.toml`` (beside ``results/``) says of each cost where it is found, and holds no measured number itself, so a
new result is in the next plan.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from llm4msr.config.base import ConfigError, Section
from llm4msr.planning.ledger import Quantity

FILE, RESULTS = "unit_costs.toml", "results"


class UnitCost(Section):
    """Where one cost is found."""

    unit: str
    """As of `Quantity`."""
    benchmark: str | None = None
    """Name of a benchmark: its newest result is read."""
    file: str | None = None
    """Another JSON file, beside unit_costs.toml."""
    figure: tuple[str, ...] = ()
    """Path of the figure in that file."""
    assumed: Annotated[float, Field(gt=0)] | None = None
    """What is taken where the benchmark has no result, or where there is none."""
    reason: str | None = None
    """Why so much."""

    @model_validator(mode="after")
    def _check(self) -> UnitCost:
        if self.benchmark and self.file:
            raise ValueError("benchmark and file both say where the figure is: give one")
        if bool(self.benchmark or self.file) != bool(self.figure):
            raise ValueError("benchmark (or file) and figure belong together")
        if (self.assumed is None) != (self.reason is None):
            raise ValueError("an assumption needs assumed and reason")
        if not self.figure and self.assumed is None:
            raise ValueError("neither a figure nor an assumption")
        return self


def read_unit_costs(folder: Path) -> list[Quantity]:
    """Reads all unit costs.

    Args:
        folder: Holds unit_costs.toml and results/, as ``benchmarks/`` does.

    Raises:
        ConfigError: The file is missing or wrong, or a result lacks a figure or has none that can be used.
    """
    path = folder / FILE
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
        costs = TypeAdapter(dict[str, UnitCost]).validate_python(tree)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read; unit costs lie in benchmarks/ of a checkout: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not TOML: {error}") from error
    except ValidationError as error:
        lines = (f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise ConfigError("\n".join(f"{path}: {line}" for line in lines)) from error
    return [_quantity(folder, name, cost) for name, cost in costs.items()]


def newest_result(folder: Path, benchmark: str) -> Path | None:
    """Returns the newest result of a benchmark, by the date in its name; None where it has none."""
    found = sorted((folder / RESULTS).glob(f"{benchmark}-????-??-??.json"))
    return found[-1] if found else None


def _quantity(folder: Path, name: str, cost: UnitCost) -> Quantity:
    path = newest_result(folder, cost.benchmark) if cost.benchmark else folder / cost.file if cost.file else None
    if path is not None:
        where = f"{folder.name}/{path.relative_to(folder).as_posix()}"
        tree = _read(path)
        source = f"{where}: {' / '.join(cost.figure)}"
        if date := tree.get("environment", {}).get("date"):
            source += f" ({date[:10]})"
        return Quantity(name, _figure(tree, cost.figure, path, name), cost.unit, "measured", source)
    if cost.assumed is None:
        raise ConfigError(
            f"{folder / RESULTS}: no {cost.benchmark}-YYYY-MM-DD.json, and {name} has no assumption: "
            f"run python -m benchmarks {cost.benchmark}"
        )
    assert cost.reason is not None
    return Quantity(name, cost.assumed, cost.unit, "assumed", cost.reason)


def _read(path: Path) -> dict[str, Any]:
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return result
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a readable result: {error}") from error


def _figure(tree: Any, figure: tuple[str, ...], path: Path, name: str) -> float:
    for key in figure:
        if not isinstance(tree, dict) or key not in tree:
            raise ConfigError(f"{path}: lacks {' / '.join(figure)}, which {name} is read from")
        tree = tree[key]
    if isinstance(tree, bool) or not isinstance(tree, (int, float)) or not 0 < tree < float("inf"):
        raise ConfigError(f"{path}: {' / '.join(figure)} is {tree!r}: {name} needs a number above 0")
    return float(tree)
