"""The jobs as a user runs them: four stages on small synthetic data, again after success, and with mistakes."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import weakref

import pytest

from jobs.evaluate import evaluate
from jobs.extract import extract
from jobs.pipeline import example_request, run_pipeline
from jobs.prepare import prepare
from jobs.report import print_table, summarise
from jobs.session import ray_session, user_message
from jobs.train import train
from llm4msr import storage, workspace
from llm4msr.config import ConfigError
from llm4msr.knowledge.place import knowledge_pointer_uri, knowledge_uri, last_pointer_uri
from llm4msr.ranker import Ranker
from llm4msr.request import RankRequest
from llm4msr.settings import load_config

RECIPE = "jobs/recipes/demo.toml"
SMALL = {
    "data.synthetic.num_users": "150",
    "data.synthetic.num_items": "300",
    "knowledge.max_events_per_scenario": "4",
    "model.embedding_dim": "8",
    "model.hidden_dims": "[32]",
    "train.max_epochs": "3",
    "train.num_workers": "0",
    "train.batch_size": "256",
    "experiment.seeds": "[0, 1]",
}


def small_config(workspace_uri, **changes):
    flags = SMALL | {"workspace_uri": str(workspace_uri)} | changes
    return load_config(["--config", RECIPE, *(part for k, v in flags.items() for part in (f"--{k}", v))], environ={})


@pytest.fixture(scope="module")
def finished(tmp_path_factory, ray_cluster):
    """A workspace after one pipeline run, with its configuration and report."""
    config = small_config(tmp_path_factory.mktemp("jobs") / "workspace")
    return config, run_pipeline(config)


def test_report_has_every_row_and_field(finished):
    config, report = finished
    assert report == storage.read_json(workspace.report_uri(config))
    runs = {(r["backbone"], r["knowledge"], r["seed"]) for r in report["results"]}
    assert runs == {("item_mean", "none", None)} | {
        ("star", k, seed) for k in ("none", "llm", "shuffled") for seed in (0, 1)
    }
    for row in report["results"]:
        assert list(row) == [
            *("backbone", "knowledge", "seed", "split", "scenario"),
            *("auc", "gauc", "log_loss", "calibration", "num_rows", "num_positives"),
        ]
    cells = {(r["split"], r["scenario"]) for r in report["results"]}
    assert cells == {(s, c) for s in ("valid", "test") for c in ("all", "recommendation", "search")}
    assert len(report["results"]) == len(runs) * len(cells)
    data = report["data"]
    rows = {(r["split"], r["scenario"]): r["num_rows"] for r in data["rows"]}
    for row in report["results"]:
        assert row["num_rows"] == rows[row["split"], row["scenario"]]
        assert 0.3 < row["auc"] < 1 and 0 < row["log_loss"] < 2
    assert data["num_users"] == 150
    assert set(report["seconds"]) == {"prepare", "extract", "train", "evaluate"}
    assert report["config"]["data"]["synthetic"]["num_users"] == 150
    assert {"llm4msr", "python", "ray", "torch", "transformers"} <= set(report["versions"])
    assert report["knowledge"]["num_encoded"] == report["knowledge"]["num_distinct_prompts"] > 150


def test_everything_is_below_the_workspace_with_its_configuration(finished):
    config, report = finished
    assert sorted(os.listdir(config.workspace_uri)) == ["knowledge", "prepared", "raw", "report.json", "runs"]
    saved = storage.read_json(storage.join(config.workspace_uri, report["checkpoint"], "config.json"))
    assert saved == report["config"]
    for uri in (workspace.prepared_uri(config), knowledge_uri(config)):
        assert storage.read_manifest(uri, "")["config"] == report["config"]


def test_a_second_run_does_nothing_again(finished):
    config, report = finished
    times = {uri: storage.fingerprint(uri) for uri, _ in storage.list_files(config.workspace_uri)}
    again = run_pipeline(config)
    assert again["results"] == report["results"]
    assert storage.read_json(workspace.report_uri(config))["seconds"] == report["seconds"]
    changed = {uri for uri, version in times.items() if storage.fingerprint(uri) != version}
    # Pointers are written again, with the same content.
    source = storage.read_manifest(knowledge_uri(config), "")
    pointers = {knowledge_pointer_uri(config), last_pointer_uri(config, source)}
    assert changed <= {workspace.prepared_pointer_uri(config), *pointers}


def test_the_four_jobs_one_by_one_give_the_same_results(finished, tmp_path):
    _, report = finished
    config = small_config(tmp_path / "other", **{"experiment.seeds": "[1]", "experiment.knowledge": '["llm"]'})
    assert storage.is_finished(prepare(config))
    assert storage.is_finished(extract(config))
    (trained,) = train(config)
    results = [row for row in evaluate(config) if row["backbone"] == "star"]
    expected = [r for r in report["results"] if (r["knowledge"], r["seed"]) == ("llm", 1)]
    assert trained["knowledge"] == "llm"
    for ours, theirs in zip(results, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-9)


def test_a_changed_learning_rate_trains_anew_and_reuses_the_rest(finished, tmp_path):
    config, report = finished
    shutil.copytree(config.workspace_uri, tmp_path / "copy")
    changed = small_config(tmp_path / "copy", **{"train.learning_rate": "0.01", "experiment.seeds": "[0]"})
    knowledge = set(os.listdir(tmp_path / "copy" / "knowledge"))
    again = run_pipeline(changed)
    old = {r["model_version"] for r in report["runs"]}
    assert not old & {r["model_version"] for r in again["runs"]}
    assert set(os.listdir(tmp_path / "copy" / "knowledge")) == knowledge


def test_printed_request_is_answered(finished):
    config, report = finished
    words = shlex.split(example_request(workspace.prepared_uri(config)))
    assert words[:3] == ["curl", "-s", "http://127.0.0.1:8000/v1/rank"]
    response = Ranker.from_checkpoint(storage.join(config.workspace_uri, report["checkpoint"])).rank(
        RankRequest(**json.loads(words[-1]))
    )
    assert response.user_known
    assert len(response.results) == 5 and all(r.known for r in response.results)


def test_the_best_run_on_valid_is_served_and_never_the_control(finished):
    _, report = finished
    best = max((r for r in report["runs"] if r["knowledge"] != "shuffled"), key=lambda r: r["valid_auc"])
    assert report["checkpoint"] == f"runs/{best['model_version']}/checkpoint"


def test_table_shows_each_model_in_each_scenario(capsys):
    def row(backbone, knowledge, seed, scenario, auc):
        metrics = {"auc": auc, "gauc": None, "log_loss": 0.5, "calibration": 1.0, "num_rows": 1234, "num_positives": 5}
        return {
            "backbone": backbone,
            "knowledge": knowledge,
            "seed": seed,
            "split": "test",
            "scenario": scenario,
        } | metrics

    rows = [row("item_mean", "none", None, s, 0.5) for s in ("all", "rec")]
    for seed, shift in ((0, 0.0), (1, 0.02)):
        rows += [row("star", "none", seed, s, 0.6 + shift) for s in ("all", "rec")]
        rows += [row("star", "llm", seed, s, 0.65 + shift) for s in ("all", "rec")]
    print_table(rows)
    text = capsys.readouterr().out
    assert "mean ± standard deviation of 2 seeds" in text
    assert text.count("0.6600 ± 0.0141") == 2 and text.count("+0.0500") == 2 and text.count("1,234") == 6
    assert "item mean" in text and "star alone" in text and "star + LLM4MSR" in text
    assert text.index("│ rec") < text.index("│ all")
    assert summarise(rows)[0]["gauc"] is None


def run(*argv, **environment):
    return subprocess.run(
        [sys.executable, "-m", *argv], capture_output=True, text=True, check=False, env=os.environ | environment
    )


@pytest.mark.parametrize("job", ["prepare", "extract", "train", "evaluate", "pipeline"])
def test_help_and_unknown_keys(job):
    shown = run(f"jobs.{job}", "--help")
    assert shown.returncode == 0 and "--train.learning_rate" in shown.stdout
    wrong = run(f"jobs.{job}", "--config", RECIPE, "--train.learnin_rate", "0.1")
    assert wrong.returncode == 2
    assert "Did you mean train.learning_rate?" in wrong.stderr and "Traceback" not in wrong.stderr


def test_a_mistake_in_the_data_is_one_clear_message(tmp_path, shared):
    """A missing column is found at once, in a real process, and told without a traceback."""
    folder = tmp_path / "ml"
    shutil.copytree(shared / "data" / "ml-100k", folder)
    (folder / "u.user").unlink()
    recipe = ("--config", "jobs/recipes/movielens_100k.toml", "--workspace_uri", str(tmp_path / "w"))
    failed = run("jobs.pipeline", *recipe, "--data.raw_uri", str(folder), RAY_ADDRESS="")
    assert failed.returncode == 2
    assert "u.user" in failed.stderr and "Traceback" not in failed.stderr
    assert not storage.exists(str(tmp_path / "w" / "report.json"))


MISTAKES = {
    "backbone": ({"model.backbone": "sttar"}, "model.backbone: Input should be 'shared_bottom', 'star', "),
    "levels": ({"model.meta.user_level": "false", "model.meta.scenario_level": "false"}, "are both off"),
}


@pytest.mark.parametrize(("flags", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_model_that_cannot_be_built_is_refused_before_anything_runs(tmp_path, flags, message):
    with pytest.raises(ConfigError, match=message):
        small_config(tmp_path, **flags)


def test_a_job_without_a_recipe_does_nothing():
    started = run("jobs.prepare")
    assert started.returncode == 2 and "--config" in started.stderr and "jobs/recipes" in started.stderr


def test_train_before_prepare_says_what_to_run(tmp_path, ray_cluster):
    with pytest.raises(storage.StorageError, match=r"run jobs\.prepare with the same configuration first"):
        train(small_config(tmp_path / "empty"))


def test_a_job_in_a_ray_task_tells_its_own_error(ray_cluster):
    @ray_cluster.remote
    def fail():
        raise storage.StorageError("x.parquet: not a readable Parquet file")

    with pytest.raises(Exception) as caught:
        ray_cluster.get(fail.remote())
    assert user_message(caught.value) == "x.parquet: not a readable Parquet file"
    assert user_message(ZeroDivisionError("a fault of the program")) is None


def test_what_a_failed_job_held_is_gone_before_ray_is(monkeypatch, ray_cluster):
    import ray

    class HalfRead:
        """Stands for the iterator of a data set, whose thread asks Ray for things until the iterator is gone."""

    alive, at_shutdown = [], []

    def fail():
        held = HalfRead()
        alive.append(weakref.ref(held))
        raise ConfigError("it cannot be")

    def job():
        try:
            fail()
        except ConfigError as error:
            raise RuntimeError("the job failed") from error

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.setattr(ray, "shutdown", lambda: at_shutdown.append(alive[0]()))
    with pytest.raises(RuntimeError, match="the job failed"), ray_session():
        job()
    assert at_shutdown == [None]
