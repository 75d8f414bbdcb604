"""What all benchmarks share: sides measured in turn, ratios between them, goals, the result and its table.

A figure alone says as much about the machine and its neighbours as about the code. So the sides of a comparison run
in turn (A B A B), a ratio is the median over the rounds of the ratio inside one round, and what another process took
from the machine hits both of its ends. Needs neither Ray nor the rest of the project.
"""

from __future__ import annotations

import argparse
import json
import operator
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

COMPARISONS = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}
# Instruction sets that decide how fast matrices are multiplied.
CPU_FLAGS = ("fma", "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16")
PACKAGES = ("torch", "transformers", "tokenizers", "ray", "sentence-transformers", "pyarrow", "numpy")
REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Goal:
    """What one figure or ratio should be.

    Attributes:
        name: What is measured, unit included.
        measured: The figure; None where it could not be measured.
        comparison: One of `COMPARISONS`, read as "measured comparison target".
        target: What it is compared with.
    """

    name: str
    measured: float | None
    comparison: str
    target: float

    @property
    def met(self) -> bool | None:
        """Whether it is reached; None where nothing was measured."""
        return None if self.measured is None else bool(COMPARISONS[self.comparison](self.measured, self.target))


@dataclass(frozen=True)
class Result:
    """One run of one benchmark.

    Attributes:
        config: Everything that decides what was run, the benchmark's name first.
        seconds: What each side took, one entry a round.
        medians: Figures by name, units in the names: rates, shares, peaks.
        ratios: By name; above 1 means that the first named is better.
        goals: What should be reached.
        not_judged: Why this run says nothing about the goals (no GPU, no data, a short form); None where it does.
        environment: As `environment` returns it.
    """

    config: dict[str, Any]
    seconds: dict[str, list[float]]
    medians: dict[str, float]
    ratios: dict[str, float]
    goals: tuple[Goal, ...]
    not_judged: str | None = None
    environment: dict[str, Any] = field(default_factory=lambda: environment())

    @property
    def met(self) -> bool | None:
        """Whether every goal is reached; None where the run does not judge."""
        return None if self.not_judged else all(goal.met is True for goal in self.goals)

    def to_json(self) -> dict[str, Any]:
        """Returns the content of the result file."""
        goals = [
            {
                "name": goal.name,
                "measured": _rounded(goal.measured),
                "comparison": goal.comparison,
                "target": goal.target,
                "met": None if self.not_judged else goal.met is True,
            }
            for goal in self.goals
        ]
        return {
            "environment": self.environment,
            "config": self.config | ({"not_judged": self.not_judged} if self.not_judged else {}),
            "seconds": {side: [_rounded(s) for s in values] for side, values in self.seconds.items()},
            "medians": {name: _rounded(value) for name, value in self.medians.items()},
            "ratios": {name: _rounded(value) for name, value in self.ratios.items()},
            "goals": goals,
            "met": self.met,
        }


def interleave(
    sides: Mapping[str, Callable[[], float | None]], rounds: int, warm_up: bool = True
) -> dict[str, list[float]]:
    """Runs every side once a round, always in the same order: A B A B.

    Args:
        sides: What to run. A side may return the seconds that count (start-up left out); else its whole time does.
        rounds: How many times each runs.
        warm_up: Run a first round that is not kept.

    Returns:
        Seconds of each side, one entry a round.
    """
    if rounds < 1:
        raise ValueError(f"rounds = {rounds}: at least one is needed")
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(-1 if warm_up else 0, rounds):
        for name, side in sides.items():
            started = time.perf_counter()
            own = side()
            took = time.perf_counter() - started if own is None else own
            if number >= 0:
                seconds[name].append(took)
    return seconds


def rates(seconds: Sequence[float], work: float) -> list[float]:
    """Returns work per second of each round, such as prompts/s."""
    return [work / s for s in seconds]


def paired_ratio(rates_a: Sequence[float], rates_b: Sequence[float]) -> float:
    """Returns how many times faster A is than B: the median over the rounds of A's rate over B's in the same round."""
    return statistics.median(a / b for a, b in zip(rates_a, rates_b, strict=True))


def environment() -> dict[str, Any]:
    """Returns date, hardware and versions; nothing that names a machine or a place on it."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    model, flags = _cpu()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": model,
        "cpu_flags": [flag for flag in CPU_FLAGS if flag in flags],
        "num_cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory_bytes / 2**30, 1),
        "load_average_1_min": round(os.getloadavg()[0], 2),
        "gpu": _gpu(),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "llm4msr": _commit(),
    }


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """Returns the command line that every benchmark has; it may add options of its own."""
    options = argparse.ArgumentParser(f"python -m benchmarks.{name}", description=description)
    options.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    options.add_argument("--short", action="store_true", help="a quick look at small sizes that judges no goal")
    return options


def report(result: Result, json_path: Path | None) -> None:
    """Prints all figures of a run and writes its file."""
    console = wide_console()
    written = result.to_json()
    for title in ("medians", "ratios"):
        for name, value in written[title].items():
            console.print(f"{title[:-1]:7} {value:>14,.3f}  {name}", highlight=False, markup=False)
    console.print(goal_table([written]))
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(written, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def goal_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """Returns one table of goal, measured and met over the results of several benchmarks.

    Args:
        results: As `Result.to_json` returns them.
    """
    table = Table("benchmark", "goal", "measured", "target", "met")
    for result in results:
        name, reason = result["config"]["benchmark"], result["config"].get("not_judged")
        for goal in result["goals"]:
            measured = "-" if goal["measured"] is None else f"{goal['measured']:,.4g}"
            met = f"not judged: {reason}" if reason else "yes" if goal["met"] else "no"
            table.add_row(name, goal["name"], measured, f"{goal['comparison']} {goal['target']:,g}", met)
    return table


def wide_console() -> Console:
    """Returns a console as wide as the terminal, or wide enough for a table where the output is a file."""
    return Console() if sys.stdout.isatty() else Console(width=150)


def shared_path() -> Path | None:
    """Returns the folder of real data, LLM4MSR_SHARED (default ../shared); None where there is none."""
    path = (REPOSITORY / os.environ.get("LLM4MSR_SHARED", "../shared")).resolve()
    return path if (path / "data").is_dir() else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def _cpu() -> tuple[str, frozenset[str]]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine(), frozenset()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return fields.get("model name", platform.machine()), frozenset(fields.get("flags", "").split())


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Returns the commit of this checkout, with "+changes" where files differ from it; None outside of git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(REPOSITORY), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        changes = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return None
