"""Quality against other libraries: the data all sides read, one way to run, score and choose, and the figures."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest

from benchmarks import quality_ours, quality_peers
from benchmarks.harness import REPOSITORY
from benchmarks.quality_data import export, peer_scale
from benchmarks.quality_peers import PEER_MODELS, SCRIPTS, Bench, Run, compare, our_config, parse, why_not_judged
from benchmarks.quality_report import Finished, best_on_valid, contests, difference, judge, show, write
from benchmarks.train_peers import ENVIRONMENTS, PEERS
from benchmarks.train_sides import make_collator
from llm4msr.settings import config_from_dict
from llm4msr.training.metrics import auc
from llm4msr.training.reader import read_split
from llm4msr.training.run import TRAIN_VERSION
from tests.tiny import SEQUENCES, tiny_prepared

MODEL = {"embedding_dim": 8, "hidden_dims": [16], "tower_dims": [4], "unseen_dropout": 0.2, "dropout": 0.01}
TRAIN = {"batch_size": 64, "max_epochs": 6, "patience": 3}
CONFIG = config_from_dict({"workspace_uri": "unused", "model": MODEL, "train": TRAIN})
RECIPE = "jobs/recipes/amazon_food_kitchen.toml"


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    folder = tmp_path_factory.mktemp("quality")
    return Bench(CONFIG, tiny_prepared(str(folder / "prepared"), num_rows=4000).uri, folder / "work")


def finished(label: str, seed: int, valid: float, test: float, rate: float = 1e-3, penalty: float = 0.0) -> Finished:
    parts = [{"mean": v, "all": v - 0.1, "rec": v + 0.01, "search": v - 0.01} for v in (valid, test)]
    return Finished(label, rate, penalty, seed, 3, 1.5, *parts)


def test_exported_columns_are_what_the_collator_encodes(bench):
    features = bench.tables["features"]
    assert [f["kind"] for f in features] == ["categorical"] * 4 + ["sequence"] + ["numeric"] * 2
    assert [f["name"] for f in features] == ["user_id", "item_id", "genre", "search_source", "tags", "age", "price"]
    collate = make_collator(bench.prepared, None)
    for split in ("train", "valid", "test"):
        rows, table = read_split(bench.prepared.files(split)), pq.read_table(bench.tables[split])
        batch = collate(rows)
        columns = [*batch.ids_BF.T.tolist(), batch.sequences[0].tolist(), *batch.numeric_BN.T.tolist()]
        assert [table[f["column"]].to_pylist() for f in features] == columns
        assert table["scenario"].to_pylist() == rows["scenario"].tolist()
        assert table["label"].to_pylist() == rows["label"].tolist()
        assert len(table) == bench.prepared.num_rows(split) > 0
    assert bench.peer_scale == peer_scale(bench.prepared) == pytest.approx(1 / math.sqrt(42 * 32))


def test_histories_are_refused(tmp_path):
    prepared = tiny_prepared(str(tmp_path / "p"), more=SEQUENCES[:1])
    with pytest.raises(ValueError, match=r"history features \['liked'\] cannot be exported"):
        export(prepared, tmp_path / "data")


def test_scores_of_every_side_are_judged_by_one_exact_auc(bench, tmp_path):
    label_R, scenario_R = bench.labels["test"]
    score_R = np.random.default_rng(0).random(len(label_R)) + 0.3 * label_R
    np.save(tmp_path / "s.npy", score_R)
    found = bench.score(tmp_path / "s.npy", "test")
    parts = [auc(label_R[scenario_R == s], score_R[scenario_R == s]) for s in (0, 1)]
    assert found == {"mean": np.mean(parts), "all": auc(label_R, score_R), "rec": parts[0], "search": parts[1]}
    assert 0.55 < found["all"] < 0.9
    for wrong_R in (score_R[1:], np.where(label_R > 0, score_R, np.nan)):
        np.save(tmp_path / "s.npy", wrong_R)
        with pytest.raises(RuntimeError, match="scores of test"):
            bench.score(tmp_path / "s.npy", "test")


def test_our_runs_have_no_more_than_the_peers(bench):
    config = config_from_dict(our_config(CONFIG, Run("ours", "star", 3e-3, 0.1, 0), 0.5))
    assert (config.model.backbone, config.model.unseen_dropout, config.model.dropout) == ("star", 0, 0.01)
    assert (config.train.learning_rate, config.train.embedding_l2, config.train.num_workers) == (3e-3, 0.1, 0)
    assert config.experiment.knowledge == ("none",) and config.train.batch_size == 64
    assert our_config(CONFIG, Run("ours", "star+unseen", 3e-3, 0.1, 0), 0.5)["model"]["unseen_dropout"] == 0.2
    dense = config_from_dict(CONFIG.model_dump(mode="json") | {"train": {"embedding_optimizer": "dense_adam"}})
    train = our_config(dense, Run("ours", "star", 3e-3, 0.1, 0), 0.5)["train"]
    assert (train["embedding_l2"], train["embedding_weight_decay"]) == (0, pytest.approx(0.1))
    peer = bench.spec(Run("fuxictr", "deepfm", 3e-3, 0.1, 0))
    assert peer["embedding_l2"] == pytest.approx(0.1 / math.sqrt(42 * 32)) and peer["learning_rate"] == 3e-3
    for name in ("batch_size", "max_epochs", "patience", "weight_decay"):
        assert peer[name] == getattr(config.train, name)
    for name in ("embedding_dim", "hidden_dims", "tower_dims", "dropout"):
        assert peer[name] == getattr(config.model, name)


@pytest.mark.parametrize("name", ["amazon_food_kitchen", "compare_food_kitchen", "compare_movielens"])
def test_recipes_whose_models_read_knowledge_are_compared_without_it(name):
    _, config = parse(["--recipe", str(REPOSITORY / "jobs" / "recipes" / f"{name}.toml")])
    model = config_from_dict(our_config(config, Run("ours", "mmoe", 3e-3, 0.1, 0), 0.5)).model
    assert (config.model.knowledge_match, model.knowledge_match, model.backbone) == (True, False, "mmoe")


def test_a_run_is_kept_and_found_again(bench, monkeypatch):
    run = Run("ours", "shared_bottom", 1e-2, 0.0, 1)
    first = bench.finish(run)
    # The planted labels are found only where scores and labels are of the same rows.
    assert first.test["mean"] > 0.6 and first.valid["mean"] > 0.6 and 1 <= first.epochs <= 6
    assert (first.label, first.seed, first.learning_rate) == ("ours:shared_bottom", 1, 1e-2)
    assert not (bench.folder / "running").exists()

    def fail(*arguments):
        raise RuntimeError("trained anew")

    monkeypatch.setattr(quality_peers, "run_process", fail)
    assert bench.finish(run) == first
    with pytest.raises(RuntimeError, match="trained anew"):
        bench.finish(Run("ours", "shared_bottom", 1e-2, 0.0, 2))


def test_our_runs_belong_to_one_state_of_the_code(bench, tmp_path, monkeypatch):
    shutil.copytree(REPOSITORY / "llm4msr", tmp_path / "llm4msr", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(quality_ours, "REPOSITORY", tmp_path)
    assert quality_ours.code_version() == bench.code == bench.spec(Run("ours", "star", 1e-2, 0.0, 1))["code"]
    assert "code" not in bench.spec(Run("fuxictr", "mlp", 1e-2, 0.0, 1))
    seen = [bench.code]
    for name in ("training/trainer.py", "models/backbones/star.py", "batch.py"):
        with (tmp_path / "llm4msr" / name).open("a") as file:
            file.write("# another\n")
        seen.append(quality_ours.code_version())
    monkeypatch.setattr(quality_ours, "TRAIN_VERSION", TRAIN_VERSION + 1)
    seen.append(quality_ours.code_version())
    assert len({str(version) for version in seen}) == 5
    (tmp_path / "llm4msr" / "ranker.py").write_text("")
    assert quality_ours.code_version() == seen[-1]


def test_a_process_that_fails_says_why_and_leaves_nothing(bench):
    bad = Run("ours", "star", 1e30, 0.0, 0)
    before = sorted(bench.folder.glob("runs/*"))
    with pytest.raises(RuntimeError, match=r"ours:star ended with exit code 1: (?s:.*)TrainingDiverged"):
        bench.finish(bad)
    assert sorted(bench.folder.glob("runs/*")) == before


@pytest.mark.parametrize("side", SCRIPTS)
def test_each_model_of_a_peer_learns_the_planted_labels(bench, side, tmp_path):
    peer = PEERS[side]
    place = ENVIRONMENTS / f"{peer.package}-{peer.version}"
    if not (place / "ready").exists():
        pytest.skip(f"needs the environment of {peer.requirement}, which benchmarks.quality_peers makes")
    calls = []
    for model in PEER_MODELS[side]:
        folder = tmp_path / model
        folder.mkdir()
        spec = bench.spec(Run(side, model, 2e-2, 0.0, 0)) | bench.tables | {"folder": str(folder), "max_epochs": 3}
        (folder / "spec.json").write_text(json.dumps(spec))
        calls.append(str(folder / "spec.json"))
    module = SCRIPTS[side].removesuffix(".py")
    code = f"import sys, {module} as m\nfor path in {calls!r}:\n    sys.argv[1:] = [path]\n    assert m.main() == 0"
    done = subprocess.run(
        [str(place / "bin" / "python"), "-c", code], cwd=REPOSITORY / "benchmarks", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"epochs"')]
    assert len(lines) == len(calls) and all(1 <= line["epochs"] <= 3 for line in lines)
    means = {model: bench.score(tmp_path / model / "test.npy", "test")["mean"] for model in PEER_MODELS[side]}
    assert min(means.values()) > 0.6, means


def test_the_peers_scripts_know_nothing_of_the_project():
    for name in (*SCRIPTS.values(), "quality_batches.py"):
        source = (REPOSITORY / "benchmarks" / name).read_text()
        assert not re.search(r"^\s*(from|import) (llm4msr|benchmarks)", source, re.MULTILINE), name


class Told:
    """Results by run, in the place of a training."""

    def __init__(self, valid: dict) -> None:
        self.valid, self.runs = valid, []

    def finish(self, run: Run) -> Finished:
        self.runs.append(run)
        if run.learning_rate == 9:
            raise RuntimeError("diverged")
        value = self.valid[run.learning_rate, run.penalty]
        return finished(run.label, run.seed, value, value, run.learning_rate, run.penalty)


def test_the_best_pair_on_valid_runs_with_all_seeds():
    told = Told({(0.1, 0.0): 0.6, (0.1, 1.0): 0.7, (0.2, 0.0): 0.8, (0.2, 1.0): 0.65})
    chosen, failures = compare(told, ["ours:star", "fuxictr:mlp"], (0.1, 0.2, 9), (0.0, 1.0), (0, 1, 2))
    assert list(chosen) == ["ours:star", "fuxictr:mlp"]
    assert [(r.learning_rate, r.penalty, r.seed) for r in chosen["ours:star"]] == [(0.2, 0.0, s) for s in (0, 1, 2)]
    assert len(told.runs) == 2 * (6 + 2) and [r.seed for r in told.runs[:6]] == [0] * 6
    assert len(failures) == 4 and failures["ours:star, 9, 1, seed 0"] == "diverged"
    assert compare(told, ["ours:star"], (9,), (0.0,), (0,))[0] == {}


def test_only_the_finalists_of_each_side_run_with_all_seeds():
    valid = {"ours:star": 0.7, "ours:mmoe": 0.8, "ours:star+unseen": 0.6, "fuxictr:mlp": 0.5, "fuxictr:deepfm": 0.4}
    told = SimpleNamespace(finish=lambda run: finished(run.label, run.seed, valid[run.label] - run.seed / 10, 0.5))
    chosen, failures = compare(told, list(valid), (0.1,), (0.0,), (0, 1, 2), num_finalists=1)
    seeds = {label: len(runs) for label, runs in chosen.items()}
    assert seeds == {"ours:star": 1, "ours:mmoe": 3, "ours:star+unseen": 3, "fuxictr:mlp": 3, "fuxictr:deepfm": 1}
    # Its mean is 0.7, and the one seed of star is no contest of it.
    assert best_on_valid(chosen, ["ours:star", "ours:mmoe"]) == "ours:mmoe" and not failures
    assert parse(["--recipe", RECIPE, "--finalists", "2"])[0].finalists == 2


def test_best_is_chosen_on_valid_and_judged_on_test(tmp_path, capsys):
    values = {
        "ours:star": ((0.80, 0.70), (0.82, 0.74)),
        "ours:mmoe": ((0.70, 0.90), (0.70, 0.90)),
        "ours:star+unseen": ((0.90, 0.95), (0.90, 0.95)),
        "torch-rechub:mmoe": ((0.75, 0.71), (0.75, 0.71)),
        "fuxictr:mlp": ((0.60, 0.99), (0.60, 0.99)),
    }
    chosen = {label: [finished(label, s, *pair) for s, pair in enumerate(pairs)] for label, pairs in values.items()}
    assert best_on_valid(chosen, ["ours:star", "ours:mmoe", "absent"]) == "ours:star"
    assert best_on_valid(chosen, []) is None
    assert contests(chosen) == {
        "best": ("ours:star", "torch-rechub:mmoe"),
        "ours:mmoe - torch-rechub:mmoe": ("ours:mmoe", "torch-rechub:mmoe"),
        "best with unseen_dropout": ("ours:star+unseen", "torch-rechub:mmoe"),
    }
    of_best = difference(chosen["ours:star"], chosen["torch-rechub:mmoe"], "mean")
    std = np.std([0.70, 0.74], ddof=1)
    assert list(of_best.values()) == pytest.approx([0.01, std, std / math.sqrt(2)])
    result = judge("tiny", {"benchmark": "quality_peers"}, chosen, {"a run": "why"}, None)
    assert [goal.measured for goal in result.goals] == pytest.approx([0.01, 0.01]) and result.met is True
    assert result.config["best"] == {"ours": "ours:star", "peers": "torch-rechub:mmoe"}
    assert result.config["chosen"]["ours:mmoe"] == {"learning_rate": 1e-3, "penalty": 0.0, "seeds": 2}
    assert result.medians["ours:star: test AUC, search"] == pytest.approx(0.71)
    assert result.ratios["best: mean"] == pytest.approx(0.72 / 0.71)
    write(result, tmp_path / "new" / "r.json")
    written = json.loads((tmp_path / "new" / "r.json").read_text())
    assert written["met"] is True and written["config"]["failures"] == {"a run": "why"}
    show(result, chosen)
    printed = capsys.readouterr().out
    assert "0.7200 ± 0.0283" in printed and "+0.0100 ± 0.0283" in printed and "failed: a run" in printed


def test_without_a_peer_or_a_second_seed_nothing_is_made_up(capsys):
    chosen = {"ours:star": [finished("ours:star", 0, 0.8, 0.7)]}
    result = judge("tiny", {"benchmark": "quality_peers"}, chosen, {}, "not all models")
    assert [goal.measured for goal in result.goals] == [None, None] and result.met is None
    assert not any("std" in name for name in result.medians) and json.dumps(result.to_json(), allow_nan=False)
    show(result, chosen)
    show(judge("tiny", {"benchmark": "quality_peers"}, {}, {}, "not all models"), {})
    assert "0.7000" in capsys.readouterr().out


def test_only_a_contest_with_all_models_of_the_peers_is_judged():
    labels = [f"{side}:{model}" for side, models in PEER_MODELS.items() for model in models]
    chosen = {label: [finished(label, 0, 0.6, 0.6)] for label in ["ours:star", *labels]}
    assert why_not_judged(chosen, 5) is None and why_not_judged(chosen, 4) == "fewer than 5 seeds"
    del chosen["fuxictr:mlp"]
    assert why_not_judged(chosen, 5) == "1 models of the peers are missing"


def test_the_command_line_names_models_and_settings(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    options, config = parse(["--recipe", RECIPE, "--workspace", "w", "--train.max_epochs", "7"])
    assert (options.name, config.workspace_uri, config.train.max_epochs) == ("amazon_food_kitchen", "w", 7)
    assert len(options.learning_rates) * len(options.penalties) == 9 and options.seeds == 5
    sides = {label.split(":")[0] for label in options.models}
    assert sides == {"ours", *PEERS} and {"ours:star+unseen", "ours:hamur", "fuxictr:mlp"} < set(options.models)
    assert "ours:star+unseen" not in parse(["--recipe", "jobs/recipes/movielens_100k.toml"])[0].models
    assert parse(["--recipe", RECIPE, "--models", "fuxictr:", "ours:star"])[0].models == [
        "ours:star",
        *(f"fuxictr:{name}" for name in PEER_MODELS["fuxictr"]),
    ]
    quick, config = parse(["--recipe", RECIPE, "--quick"])
    assert (quick.seeds, len(quick.models), config.train.max_epochs) == (1, 3, 1)
    with pytest.raises(SystemExit):
        parse(["--recipe", RECIPE, "--models", "fuxictr:star"])
