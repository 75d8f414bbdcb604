"""Memory of a whole extraction as the data grows: peak of driver and actors with n users and with 10 n.

Synthetic logs are prepared first, outside of what is measured. Then each extraction runs in processes of its own,
with a tiny BERT of random weights and the embedded encoder's tokenizer, so that the language model costs next to
nothing and what grows with the users would show. This process samples the memory of all of them meanwhile:

* rss: resident memory, what the goals are about. Pages of Ray's object store that a process has touched count in each.
* uss: what the process alone holds; no object store, no libraries shared with others.
* pss: shared pages are divided among those who share them.

Kinds of process: driver, actor (the language model), worker (Ray's other tasks: writing prompts and the like), and
ray (its daemons).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from collections import defaultdict
from pathlib import Path

import psutil

from benchmarks.harness import Goal, Result, interleave, parser, report
from llm4msr.config import Config

NAME = "extract_memory"
METRICS = ("rss", "uss", "pss")
KINDS = ("driver", "actor", "worker", "ray")
GROWTH = 10
SAMPLE_SECONDS = 0.2
ROWS_PER_USER = {"rec_rows_per_user": 8, "search_rows_per_user": 4}
MODEL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


class Sampler:
    """Samples the memory of a process and all below it until it ends.

    Args:
        process: The driver.
    """

    def __init__(self, process: psutil.Process) -> None:
        self._driver = process
        self._actors: set[int] = set()
        self._by_process: dict[tuple[int, str], dict[str, int]] = defaultdict(dict)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> dict[tuple[str, str], int]:
        """Ends sampling; returns bytes by (kind, metric), the largest process of that kind at its peak."""
        self._ended.set()
        self._thread.join()
        peaks: dict[tuple[str, str], int] = defaultdict(int)
        for (pid, kind), metrics in self._by_process.items():
            kind = "actor" if pid in self._actors else kind
            for metric, value in metrics.items():
                peaks[kind, metric] = max(peaks[kind, metric], value)
        return dict(peaks)

    def _watch(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            try:
                processes = [self._driver, *self._driver.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            for process in processes:
                try:
                    self._sample(process)
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue  # it ended meanwhile

    def _sample(self, process: psutil.Process) -> None:
        title = " ".join(process.cmdline()[:1])
        if process.pid == self._driver.pid:
            kind = "driver"
        else:
            kind = "worker" if title.startswith("ray::") else "ray"
            if "EncodeUnit" in title:
                self._actors.add(process.pid)
        memory, seen = process.memory_full_info(), self._by_process[process.pid, kind]
        for metric in METRICS:
            seen[metric] = max(seen.get(metric, 0), getattr(memory, metric))


def make_config(workspace_path: Path, model_path: Path, num_users: int) -> Config:
    """Returns the configuration of one size of data; everything not named is as a user gets it."""
    from llm4msr.settings import config_from_dict

    synthetic = {"num_users": num_users, "num_items": 2000, **ROWS_PER_USER}
    return config_from_dict(
        {
            "workspace_uri": str(workspace_path / str(num_users)),
            "data": {"kind": "synthetic", "synthetic": synthetic},
            "knowledge": {"model": str(model_path)},
        }
    )


def save_model(folder: Path) -> None:
    """Writes a tiny BERT of random weights with the embedded encoder's tokenizer."""
    import torch
    import transformers

    from llm4msr.knowledge.engines.model_files import EMBEDDED, find_local

    local = find_local(EMBEDDED)
    assert local is not None, EMBEDDED
    tokenizer = transformers.AutoTokenizer.from_pretrained(local.path)
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(vocab_size=len(tokenizer), **MODEL)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run_here(step: str, workspace_path: Path, model_path: Path, num_users: int) -> dict[str, float]:
    """Runs one step in this process, which becomes Ray's driver; returns figures of its summary."""
    from jobs.session import ray_session
    from llm4msr import storage

    config = make_config(workspace_path, model_path, num_users)
    if step == "prepare":
        from jobs.prepare import prepare

        save_model(model_path)
        with ray_session():
            prepare(config)
        return {}
    from llm4msr import workspace
    from llm4msr.knowledge.pipeline import extract

    storage.remove(workspace.knowledge_root(config))
    with ray_session():
        summary = storage.read_json(storage.join(extract(config), "summary.json"))
    return {name: summary[name] for name in ("seconds", "num_prompts", "num_actors")}


def in_processes(step: str, *arguments: object) -> tuple[dict[str, float], dict[tuple[str, str], int]]:
    """Runs one step in processes of its own; returns what it printed and the peaks of their memory."""
    command = [sys.executable, "-m", f"benchmarks.{NAME}", "--step", step, "--of", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        sampler = Sampler(psutil.Process(process.pid))
        printed, _ = process.communicate()
        peaks = sampler.stop()
    if process.returncode:
        raise RuntimeError(f"{step} of {arguments[-1]} users ended with exit code {process.returncode}: see its output")
    return json.loads(printed.splitlines()[-1]), peaks


def run(num_users: int, rounds: int, not_judged: str | None) -> Result:
    """Measures everything.

    Args:
        num_users: n.
        rounds: Of each size.
        not_judged: As of `Result`.
    """
    sizes = {"n": num_users, "10n": GROWTH * num_users}
    peaks: dict[tuple[str, str, str], int] = defaultdict(int)
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="llm4msr-") as folder:
        places = (Path(folder) / "workspace", Path(folder) / "model")
        for count in sizes.values():
            in_processes("prepare", *places, count)

        def extraction(size: str) -> float:
            found, memory = in_processes("extract", *places, sizes[size])
            for (kind, metric), value in memory.items():
                peaks[size, kind, metric] = max(peaks[size, kind, metric], value)
            figures.update({f"{size} {name}": found[name] for name in ("num_prompts", "num_actors")})
            return found["seconds"]

        seconds = interleave({size: lambda size=size: extraction(size) for size in sizes}, rounds, warm_up=False)
    known = [(kind, metric) for kind in KINDS for metric in METRICS if ("10n", kind, metric) in peaks]
    medians, ratios = dict(figures), {}
    for kind, metric in known:
        for size in sizes:
            medians[f"{size} {kind} peak {metric} MiB"] = peaks[size, kind, metric] / 2**20
        growth = peaks["10n", kind, metric] - peaks["n", kind, metric]
        medians[f"{kind} {metric} growth, bytes a user"] = growth / (sizes["10n"] - sizes["n"])
        ratios[f"{kind} {metric} 10n / n"] = peaks["10n", kind, metric] / peaks["n", kind, metric]
    goals = tuple(
        Goal(f"peak RSS of the {kind}, {GROWTH}x the users", ratios.get(f"{kind} rss 10n / n"), "<", 1.3)
        for kind in ("driver", "actor")
    )
    config = {"benchmark": NAME, "num_users": sizes, "rounds": rounds, "sample_s": SAMPLE_SECONDS}
    config |= {"data": ROWS_PER_USER, "model": MODEL}
    return Result(config, seconds, medians, ratios, goals, not_judged)


def main() -> int:
    """Runs the benchmark from the command line."""
    options = parser(NAME, __doc__.splitlines()[0])
    options.add_argument("--num_users", type=int, help="n; default 3000, short 100")
    options.add_argument("--rounds", type=int, help="of each size; default 2, short 1")
    options.add_argument("--step", choices=("prepare", "extract"), help=argparse.SUPPRESS)
    options.add_argument("--of", nargs=3, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.step:
        workspace_path, model_path, num_users = chosen.of
        print(json.dumps(run_here(chosen.step, Path(workspace_path), Path(model_path), int(num_users))))
        return 0
    num_users = chosen.num_users or (100 if chosen.short else 3000)
    rounds = chosen.rounds or (1 if chosen.short else 2)
    report(run(num_users, rounds, "short form" if chosen.short else None), chosen.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
