"""Quality of the backbones without any knowledge against torch-rechub and fuxictr: the same rows, features, budget.

    python -m benchmarks.quality_peers --recipe jobs/recipes/amazon_food_kitchen.toml

All sides read the same split of one prepared directory, encoded by the project's own collator, and get the same
widths, dropout, batch size, most epochs, patience and rule to stop by (mean of the scenarios' AUC on valid), and as
many tries: each pair of a learning rate and a penalty on embeddings once, with the first seed. The pair that is best
on valid then runs with all seeds; with ``--finalists N`` only that of the N best models of a side does. Whatever a
side computes of itself, the AUC here is the project's exact one, of the scores that the side writes to a file.

* Penalty: ours weighs the squared norm of the rows that a training row looks up, the peers' that of all tables in
  each step. A table's row that a share p of the training rows looks up is held back alike where theirs = p x ours. So
  theirs is ours over the rows of an id table (geometric mean of user_id and item_id). Where the recipe's
  ``train.embedding_optimizer`` is dense_adam, ours is theirs.
* ``model.unseen_dropout`` is ours alone. The contest is without it; where the recipe has it, NAME+unseen is with it.
* The best of a side is chosen on valid, so that a side with more models has no advantage on test.

Runs are taken one after another, each in a process of its own with one thread of torch, and each leaves a small file in
the work folder, so the same command goes on where it stopped. Our runs belong to one state of our models and training,
and are run again with another; the peers' belong to their versions.

Axes: R rows of a split.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import numpy as np

from benchmarks.harness import REPOSITORY
from benchmarks.quality_data import export, peer_scale, read_labels
from benchmarks.quality_ours import code_version
from benchmarks.quality_report import OURS, UNSEEN, Finished, judge, show, write
from benchmarks.train_peers import ENVIRONMENT_VARIABLES, PEERS, make_environment
from llm4msr import workspace
from llm4msr.config import Config
from llm4msr.config.model import Backbone
from llm4msr.data.prepared import PreparedData
from llm4msr.schema import SPLITS
from llm4msr.settings import config_from_dict, load_config
from llm4msr.training.metrics import auc

SCRIPTS = {"torch-rechub": "quality_rechub.py", "fuxictr": "quality_fuxictr.py"}
PEER_MODELS = {
    "torch-rechub": ("shared_bottom", "mmoe", "ple", "aitm", "deepfm", "dcnv2", "dcnv2_mix"),
    "fuxictr": ("mlp", "deepfm", "dcnv2"),
}
BACKBONES: tuple[str, ...] = get_args(Backbone)
COMPARABLE = tuple(name for name in BACKBONES if any(name in models for models in PEER_MODELS.values()))
WITH_UNSEEN = ("star", *COMPARABLE)
QUICK_MODELS = ("ours:star", "torch-rechub:mmoe", "fuxictr:deepfm")
LEARNING_RATES, PENALTIES, NUM_SEEDS = (1e-3, 3e-3, 1e-2), (0.0, 0.1, 0.3), 5


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        side: ours, or a key of `PEERS`.
        model: Its model; of ours a backbone, perhaps with `UNSEEN`.
        learning_rate: Of all weights.
        penalty: On embeddings, as ours counts it.
        seed: Of everything.
    """

    side: str
    model: str
    learning_rate: float
    penalty: float
    seed: int

    @property
    def label(self) -> str:
        """Side and model."""
        return f"{self.side}:{self.model}"


class Bench:
    """The data of a comparison and the one way to run a training on it.

    Args:
        config: Widths, dropout, batch size, epochs and patience are taken from it.
        prepared_uri: The data.
        folder: Where exported data and finished runs go.
    """

    def __init__(self, config: Config, prepared_uri: str, folder: Path) -> None:
        self.config, self.prepared_uri, self.folder = config, prepared_uri, folder
        self.prepared = PreparedData.open(prepared_uri)
        self.tables = export(self.prepared, folder / "data")
        self.labels = {split: read_labels(Path(self.tables[split])) for split in ("valid", "test")}
        self.peer_scale = peer_scale(self.prepared)
        self.code = code_version()

    def spec(self, run: Run) -> dict[str, Any]:
        """Returns all that decides what a run's result is; the run's place follows from it."""
        model, train = self.config.model, self.config.train
        common = {"model": run.model, "seed": run.seed, "prepared": self.prepared_uri.rstrip("/").rsplit("/", 1)[-1]}
        if run.side == OURS:
            return common | {"side": OURS, "code": self.code, "config": our_config(self.config, run, self.peer_scale)}
        return common | {
            "side": PEERS[run.side].requirement,
            "embedding_dim": model.embedding_dim,
            "hidden_dims": model.hidden_dims,
            "tower_dims": model.tower_dims,
            "dropout": model.dropout,
            "num_experts": model.experts.num_experts,
            "num_scenario_experts": model.experts.num_scenario_experts,
            "num_levels": model.experts.num_levels,
            "batch_size": train.batch_size,
            "max_epochs": train.max_epochs,
            "patience": train.patience,
            "weight_decay": train.weight_decay,
            "learning_rate": run.learning_rate,
            "embedding_l2": run.penalty * self.peer_scale,
        }

    def finish(self, run: Run) -> Finished:
        """Trains, or finds the result of a run that was trained before.

        Raises:
            RuntimeError: The process failed, or its scores are not those of the rows; nothing is kept.
        """
        spec = self.spec(run)
        identity = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]
        kept = self.folder / "runs" / f"{run.side}-{run.model}-{identity}.json"
        if kept.exists():
            return Finished(**json.loads(kept.read_text(encoding="utf-8")))
        folder = self.folder / "running"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        places = self.tables | {"prepared_uri": self.prepared_uri, "folder": str(folder)}
        (folder / "spec.json").write_text(json.dumps(spec | places), encoding="utf-8")
        started = time.perf_counter()
        printed = run_process(run, folder)
        finished = Finished(
            label=run.label,
            learning_rate=run.learning_rate,
            penalty=run.penalty,
            seed=run.seed,
            epochs=printed["epochs"],
            seconds=time.perf_counter() - started,
            **{split: self.score(folder / f"{split}.npy", split) for split in ("valid", "test")},
        )
        kept.parent.mkdir(exist_ok=True)
        written = kept.with_suffix(".part")
        written.write_text(json.dumps(vars(finished), indent=1), encoding="utf-8")
        written.rename(kept)
        shutil.rmtree(folder)
        return finished

    def score(self, path: Path, split: str) -> dict[str, float]:
        """Returns the exact AUC of each scenario by name, their mean, and that of all rows.

        Raises:
            RuntimeError: The scores are not one finite number for each row.
        """
        score_R, (label_R, scenario_R) = np.load(path), self.labels[split]
        if score_R.shape != label_R.shape or not np.isfinite(score_R).all():
            raise RuntimeError(f"scores of {split}: {score_R.shape} for {len(label_R)} rows, or not finite")
        found = {}
        for index, name in enumerate(self.prepared.schema.scenario_names):
            rows_R = scenario_R == index
            found[name] = auc(label_R[rows_R], score_R[rows_R])
        return {"mean": float(np.mean(list(found.values()))), "all": auc(label_R, score_R), **found}


def our_config(config: Config, run: Run, peer_scale: float) -> dict[str, Any]:
    """Returns the configuration of one of our runs as a tree: model and train alone."""
    is_dense = config.train.embedding_optimizer == "dense_adam"
    # Without knowledge there is nothing to match, and a recipe's other sections are not ours.
    model = config.model.model_dump(mode="json") | {
        "backbone": run.model.removesuffix(UNSEEN),
        "knowledge_match": False,
    }
    if not run.model.endswith(UNSEEN):
        model["unseen_dropout"] = 0.0
    train = config.train.model_dump(mode="json") | {
        "num_workers": 0,
        "cpus_per_worker": 1,
        "learning_rate": run.learning_rate,
        "embedding_learning_rate": None,
        "embedding_l2": 0.0 if is_dense else run.penalty,
        # Half of a penalty's gradient is the weight itself.
        "embedding_weight_decay": 2 * run.penalty * peer_scale if is_dense else 0.0,
    }
    tree = {"workspace_uri": "unused", "model": model, "train": train, "experiment": {"knowledge": ["none"]}}
    config_from_dict(tree)  # a mistake is named before anything runs
    return tree


def run_process(run: Run, folder: Path) -> dict[str, Any]:
    """Runs one training in a process of its own; returns the JSON of its last line.

    Raises:
        RuntimeError: It failed; the message holds the end of what it said.
    """
    if run.side == OURS:
        command = [sys.executable, "-m", "benchmarks.quality_ours"]
    else:
        command = [str(make_environment(PEERS[run.side])), str(Path(__file__).parent / SCRIPTS[run.side])]
    environment = os.environ | ENVIRONMENT_VARIABLES | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command.append(str(folder / "spec.json"))
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{run.label} ended with exit code {done.returncode}: {done.stderr.strip()[-1500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(
    bench: Bench,
    labels: Sequence[str],
    rates: Sequence[float],
    penalties: Sequence[float],
    seeds: Sequence[int],
    num_finalists: int | None = None,
) -> tuple[dict[str, list[Finished]], dict[str, str]]:
    """Chooses each model's learning rate and penalty on valid with the first seed, then runs it with all seeds.

    With `num_finalists` only so many models of each side, those that were best on valid, run with the other seeds.

    Returns:
        The finished runs of each model at its choice, by label; what failed and why, by run. A model of which nothing
        finished is not in the first.
    """
    chosen: dict[str, list[Finished]] = {}
    failures: dict[str, str] = {}

    def attempt(run: Run) -> list[Finished]:
        try:
            finished = bench.finish(run)
        except RuntimeError as error:
            failures[f"{run.label}, {run.learning_rate:g}, {run.penalty:g}, seed {run.seed}"] = str(error)
            print(f"  {run}: failed: {error}", flush=True)
            return []
        told = f"{finished.epochs} epochs, {finished.seconds:.0f} s, valid {finished.valid['mean']:.4f}"
        print(f"  {run.label} rate {run.learning_rate:g} penalty {run.penalty:g} seed {run.seed}: {told}", flush=True)
        return [finished]

    for number, label in enumerate(labels, start=1):
        print(f"{number} of {len(labels)}: {label}", flush=True)
        side, _, model = label.partition(":")
        tries = [f for rate in rates for p in penalties for f in attempt(Run(side, model, rate, p, seeds[0]))]
        if not tries:
            continue
        chosen[label] = [max(tries, key=on_valid)]
    for label in finalists(chosen, num_finalists):
        side, _, model = label.partition(":")
        (best,) = chosen[label]
        chosen[label] += [f for s in seeds[1:] for f in attempt(Run(side, model, best.learning_rate, best.penalty, s))]
    return chosen, failures


def on_valid(finished: Finished) -> float:
    """Returns what a run is judged by: mean of the scenarios' AUC on valid."""
    return finished.valid["mean"]


def finalists(chosen: Mapping[str, Sequence[Finished]], number: int | None) -> list[str]:
    """Returns the best models of ours, of ours with `UNSEEN` and of each peer; None returns all."""
    groups: dict[tuple[str, bool], list[str]] = {}
    for label in chosen:
        groups.setdefault((label.partition(":")[0], label.endswith(UNSEEN)), []).append(label)
    found = [sorted(group, key=lambda label: -on_valid(chosen[label][0]))[:number] for group in groups.values()]
    return [label for group in found for label in group]


def all_labels(unseen: bool) -> list[str]:
    """Returns side:model of all that is compared; with `UNSEEN` models where the recipe has unseen_dropout."""
    ours = [*BACKBONES, *(f"{name}{UNSEEN}" for name in WITH_UNSEEN if unseen)]
    return [f"{side}:{model}" for side, models in ({OURS: ours} | PEER_MODELS).items() for model in models]


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, Config]:
    """Returns the command line and the configuration that it names."""
    options = argparse.ArgumentParser("python -m benchmarks.quality_peers", description=__doc__.splitlines()[0])
    options.add_argument(
        "--recipe", required=True, metavar="FILE", help="a recipe; further --section.key flags change it"
    )
    options.add_argument("--workspace", metavar="URI", help="instead of the recipe's workspace_uri")
    options.add_argument(
        "--prepared", metavar="URI", help="a prepared directory; default: the workspace's of this recipe"
    )
    options.add_argument("--name", help="of the data, in tables and files; default: the recipe's")
    options.add_argument("--work", type=Path, metavar="FOLDER", help="default: build/quality/NAME")
    options.add_argument("--json", type=Path, metavar="FILE", help="default: benchmarks/results/quality_NAME-DATE.json")
    options.add_argument("--models", nargs="+", metavar="SIDE:MODEL", help="default: all; SIDE: for all of a side")
    options.add_argument("--learning_rates", nargs="+", type=float, default=LEARNING_RATES)
    options.add_argument("--penalties", nargs="+", type=float, default=PENALTIES, help="values of train.embedding_l2")
    options.add_argument("--seeds", type=int, default=NUM_SEEDS, metavar="N", help="how many")
    options.add_argument(
        "--finalists", type=int, metavar="N", help="only the N best models of a side, on valid, run with all seeds"
    )
    options.add_argument("--quick", action="store_true", help="three models, one try, one epoch; judges nothing")
    chosen, flags = options.parse_known_args(argv)
    chosen.name = chosen.name or Path(chosen.recipe).stem
    chosen.work = chosen.work or REPOSITORY / "build" / "quality" / chosen.name
    if chosen.workspace:
        flags += ["--workspace_uri", chosen.workspace]
    if chosen.quick:
        flags += ["--train.max_epochs", "1", "--train.patience", "1"]
        chosen.learning_rates, chosen.penalties, chosen.seeds = chosen.learning_rates[:1], chosen.penalties[:1], 1
        chosen.models = chosen.models or QUICK_MODELS
    config = load_config(["--config", chosen.recipe, *flags], options.prog)
    known = all_labels(config.model.unseen_dropout > 0)
    wanted = known if chosen.models is None else chosen.models
    if unknown := [name for name in wanted if not any(label == name or is_side(name, label) for label in known)]:
        options.error(f"no model {unknown[0]}; there are {', '.join(known)}")
    chosen.models = [label for label in known if any(label == name or is_side(name, label) for name in wanted)]
    return chosen, config


def is_side(name: str, label: str) -> bool:
    """Tells whether a name such as "fuxictr:" means all models of the label's side."""
    return name.endswith(":") and label.startswith(name)


def described(bench: Bench, options: argparse.Namespace) -> Mapping[str, Any]:
    """Returns everything that decides what was run."""
    model, train = bench.config.model, bench.config.train
    return {
        "benchmark": f"quality_{options.name}",
        "data": {
            "name": options.name,
            "features": [f["name"] for f in bench.tables["features"]],
            "scenarios": bench.prepared.schema.scenario_names,
            "rows": {split: bench.prepared.num_rows(split) for split in SPLITS},
        },
        "model": model.model_dump(mode="json", exclude={"backbone", "meta"}),
        "train": {key: getattr(train, key) for key in ("batch_size", "max_epochs", "patience", "weight_decay")},
        "learning_rates": list(options.learning_rates),
        "penalties": {OURS: list(options.penalties), "peers": [p * bench.peer_scale for p in options.penalties]},
        "tries": f"{len(options.learning_rates) * len(options.penalties)} of each model, with seed 0",
        "seeds": options.seeds,
        "finalists": options.finalists,
        "code": bench.code,
        "peers": {name: peer.requirement for name, peer in PEERS.items()},
    }


def why_not_judged(chosen: Mapping[str, Sequence[Finished]], num_seeds: int) -> str | None:
    """Returns what is missing for a judgement: models of the peers or seeds; None where nothing is."""
    missing = [f"{side}:{model}" for side, models in PEER_MODELS.items() for model in models]
    missing = [label for label in missing if label not in chosen]
    if missing:
        return f"{len(missing)} models of the peers are missing"
    return f"fewer than {NUM_SEEDS} seeds" if num_seeds < NUM_SEEDS else None


def main() -> int:
    """Runs the comparison from the command line."""
    options, config = parse()
    bench = Bench(config, options.prepared or workspace.prepared_uri(config), options.work.resolve())
    chosen, failures = compare(
        bench,
        options.models,
        options.learning_rates,
        options.penalties,
        list(range(options.seeds)),
        options.finalists,
    )
    reason = "quick form" if options.quick else why_not_judged(chosen, options.seeds)
    result = judge(options.name, described(bench, options), chosen, failures, reason)
    show(result, chosen)
    path = options.json
    if path is None and reason is None:
        path = REPOSITORY / "benchmarks" / "results" / f"quality_{options.name}-{datetime.now(UTC):%Y-%m-%d}.json"
    if path is not None:
        write(result, path)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
