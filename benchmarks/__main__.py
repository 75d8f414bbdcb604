"""Runs all benchmarks, each in a process of its own, and prints one table: ``python -m benchmarks``.

Results go to ``benchmarks/results/NAME-YYYY-MM-DD.json``. A benchmark that this machine cannot run (no GPU, no real
data) says so in the table and its file is not kept.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.harness import REPOSITORY, goal_table, wide_console

NAMES = (
    "extract_cpu",
    "extract_resume",
    "extract_memory",
    "extract_gpu",
    "train_throughput",
    "train_meta",
    "train_backbones",
    "train_vocabulary",
    "train_growth",
    "train_workers",
    "train_gpu",
    "ranker",
    "lookup",
    "serve_latency",
    "serve_soak",
    "serve_autoscale",
)


def main() -> int:
    """Runs what was asked for; returns 0 where every benchmark ran to its end."""
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; none: all")
    parser.add_argument("--short", action="store_true", help="a quick look at small sizes; keeps no file")
    parser.add_argument("--results", type=Path, default=REPOSITORY / "benchmarks" / "results", help="where files go")
    options = parser.parse_args()
    if unknown := set(options.names) - set(NAMES):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    results, failed = [], []
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.names or NAMES:
            print(f"== {name}", flush=True)
            path = Path(scratch) / f"{name}.json"
            command = [sys.executable, "-m", f"benchmarks.{name}", "--json", str(path)]
            if subprocess.run(command + ["--short"] * options.short, cwd=REPOSITORY).returncode:
                failed.append(name)
                continue
            result = json.loads(path.read_text(encoding="utf-8"))
            results.append(result)
            if result["met"] is not None:
                options.results.mkdir(parents=True, exist_ok=True)
                kept = options.results / f"{name}-{datetime.now(UTC):%Y-%m-%d}.json"
                kept.write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    console = wide_console()
    console.print(goal_table(results))
    for name in failed:
        console.print(f"{name} ended with an error: see above")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
