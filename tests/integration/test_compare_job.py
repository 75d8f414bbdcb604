"""A comparison on tiny data: trained once, whatever happens; failures noted; the report that follows from the runs."""

from __future__ import annotations

import csv
import io
import os
import random
import shutil
import signal
import statistics
import threading

import job_process as processes
import pytest
import train_world as world
from PIL import Image

from jobs import compare as job
from jobs.evaluate import evaluate
from llm4msr import storage
from llm4msr.comparison.plan import DETAIL_FILE, EVALUATION_FILE, plan_comparison
from llm4msr.comparison.report import write_report
from llm4msr.comparison.run import is_done, item_mean, run_resources, train_all
from llm4msr.config import Config, ConfigError
from llm4msr.evaluation import evaluate_checkpoint
from llm4msr.settings import config_from_dict, load_config
from llm4msr.training.task import TrainingError, TrainingInterrupted

SMALL = {"backbones": ["star"], "knowledge": ["none"], "learning_rates": [0.003]}


def make(root: str, folder, seeds=(0, 1), train=(), **compare) -> Config:
    """A workspace and a configuration of a comparison in it."""
    settings = {"max_epochs": 2, "batch_size": 128} | dict(train)
    world.make_workspace(root, folder, 2000, **settings)
    tree = world.tree(root, **settings)
    tree["experiment"] = {"seeds": list(seeds)}
    tree["compare"] = SMALL | compare
    return config_from_dict(tree)


def compare(config: Config):
    """What jobs.compare does after the knowledge is there."""
    planned = plan_comparison(config)
    outcome = train_all(planned)
    return write_report(planned, outcome, item_mean(planned), "the command")


def all_tasks(config: Config) -> dict[str, object]:
    models = plan_comparison(config).models
    return {task.name: task for m in models for tasks in m.runs.values() for task in tasks}


def written(config: Config) -> dict[str, int]:
    """When each run's weights and evaluations were written."""
    found = {}
    for name, task in all_tasks(config).items():
        for file in ("checkpoint/model.safetensors", EVALUATION_FILE, DETAIL_FILE):
            place = storage.local_path(storage.join(task.run_uri, file))
            if place.exists():
                found[f"{name}/{file}"] = place.stat().st_mtime_ns
    return found


def block(task) -> object:
    """Makes a run fail: a file lies where a folder must be."""
    place = storage.local_path(task.training_uri)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("a file where a folder must be")
    return place


@pytest.fixture(scope="module")
def finished(ray_cluster, tmp_path_factory):
    """Two backbones, three kinds of knowledge and an ablation; configuration and report."""
    folder = tmp_path_factory.mktemp("compare")
    config = make(
        str(folder / "ws"),
        folder,
        backbones=["shared_bottom", "star"],
        knowledge=["none", "llm", "random"],
        variants=[{"name": "user level only", "set": {"model.meta.scenario_level": False}}],
        learning_rates=[1e-6, 0.01],
    )
    return config, compare(config)


# ---------------------------------------------------------------- a whole comparison


def test_every_model_has_its_learning_rate_from_valid_and_all_seeds(finished):
    config, report = finished
    models = {(m["backbone"], m["variant"]): m for m in report.summary["models"]}
    variants = ["none", "llm", "random", "user level only"]
    assert list(models) == [(b, v) for b in ("shared_bottom", "star") for v in variants]
    for planned, model in zip(plan_comparison(config).models, models.values(), strict=True):
        exact = {}
        for rate, task in planned.tuning.items():
            rows = evaluate_checkpoint(task.checkpoint_uri, task.prepared_uri)
            aucs = [r["auc"] for r in rows if r["split"] == "valid" and r["scenario"] != "all"]
            exact[rate] = statistics.fmean(aucs)
        assert [t["valid_auc"] for t in model["tuning"]] == pytest.approx(list(exact.values()))
        assert model["learning_rate"] == max(exact, key=exact.get)
        assert [(r["seed"], r["chosen"]) for r in model["runs"] if r["learning_rate"] == model["learning_rate"]] == [
            (0, True),
            (1, True),
        ]
        assert len(model["runs"]) == 3  # the other learning rate with one seed
    chosen = {m["learning_rate"] for m in models.values()}
    assert 0.01 in chosen  # 1e-6 learns nothing in two epochs


def test_gains_are_those_of_equal_seeds(finished):
    config, report = finished
    auc = {}
    for planned, model in zip(plan_comparison(config).models, report.summary["models"], strict=True):
        for task in planned.runs[model["learning_rate"]]:
            rows = storage.read_json(storage.join(task.run_uri, EVALUATION_FILE))
            for row in rows:
                auc[planned.backbone, planned.variant, task.seed, row["split"], row["scenario"]] = row["auc"]
    rows = [r for r in report.summary["scenarios"] if r["variant"] not in ("none", "baseline")]
    assert len(rows) == 3 * 2 * 3
    for row in rows:
        ours, base = (
            [auc[row["backbone"], variant, seed, "test", row["scenario"]] for seed in (0, 1)]
            for variant in (row["variant"], "none")
        )
        assert row["auc"] == pytest.approx(statistics.fmean(ours))
        assert row["gain"]["mean"] == pytest.approx(statistics.fmean(ours) - statistics.fmean(base))
        assert row["gain"]["num_seeds"] == 2
    controls = report.summary["controls"]
    assert len(controls) == 3 * 2
    for row in controls:
        assert (row["variant"], row["control"]) == ("llm", "random")
        differences = [
            auc[row["backbone"], "llm", seed, "test", row["scenario"]]
            - auc[row["backbone"], "random", seed, "test", row["scenario"]]
            for seed in (0, 1)
        ]
        assert row["gain"]["mean"] == pytest.approx(statistics.fmean(differences))
        assert row["gain"]["std"] == pytest.approx(statistics.stdev(differences))
    assert report.summary["num_tests"] == len(rows) + len(controls)


def test_everything_is_written(finished):
    _, report = finished
    names = {os.path.relpath(name, report.uri) for name, _ in storage.list_files(report.uri)}
    plots = ["auc_by_scenario", "auc_by_user_activity", "calibration", "training_curves"]
    plots += ["gain_by_scenario", "gain_by_user_activity", "gain_cold"]
    files = {"item_mean.json", "manifest.json", "plan.json", "report.html", "results.csv", "summary.json", "table.md"}
    assert names == files | {f"plots/{name}.png" for name in plots}
    for name in plots:
        with Image.open(storage.local_path(storage.join(report.uri, "plots", f"{name}.png"))) as image:
            image.load()
            assert image.format == "PNG" and min(image.size) >= 300
    assert report.summary == storage.read_json(storage.join(report.uri, "summary.json"))
    assert report.summary["failures"] == []
    assert {"config_digest", "versions", "data", "command", "seeds"} <= set(report.summary)

    text = storage.local_path(storage.join(report.uri, "results.csv")).read_text()
    rows = list(csv.DictReader(io.StringIO(text)))
    assert len({row["run"] for row in rows}) == 8 * 3
    cells = [
        row
        for row in rows
        if (row["kind"], row["metric"], row["split"], row["scenario"]) == ("everything", "auc", "test", "rec")
    ]
    assert len(cells) == 24 and sum(row["chosen"] == "True" for row in cells) == 16
    assert all(0 < float(row["value"]) < 1 for row in cells)
    kinds = {"everything", "user activity", "user", "item", "score bin", "epoch"}
    assert {row["kind"] for row in rows} == kinds

    table = storage.local_path(storage.join(report.uri, "table.md")).read_text()
    for heading in ("## Scenario rec", "## Scenario search", "## All scenarios together", "## Cold users"):
        assert heading in table
    assert "item_mean" in table and "user level only" in table
    assert "llm against its controls" in [grid.title for grid in report.grids]
    assert report.summary["num_learning_rates_at_edge"] == 8 and "of 8 of 8 models is at the edge" in table
    assert report.summary["trained_otherwise"] == [] and "found again" not in table
    page = storage.local_path(storage.join(report.uri, "report.html")).read_text()
    assert "## llm against its controls" in table and "<h2>llm against its controls</h2>" in page
    assert "the command" in page and report.summary["config_digest"] in page
    assert "http" not in page.replace("http-equiv", "")


def test_given_again_it_trains_nothing_and_jobs_evaluate_finds_it(finished, ray_cluster):
    config, report = finished
    before = written(config)
    assert len(before) == 3 * 24
    again = compare(config)
    assert written(config) == before
    same = ("models", "scenarios", "slices", "config_digest")
    assert {name: again.summary[name] for name in same} == {name: report.summary[name] for name in same}

    (rate,) = {m["learning_rate"] for m in report.summary["models"] if (m["backbone"], m["variant"]) == ("star", "llm")}
    tree = config.model_dump(mode="json")
    tree["train"] |= {"learning_rate": rate}
    tree["experiment"] |= {"knowledge": ["llm"]}
    tree["model"] |= {"backbone": "star"}
    rows = evaluate(config_from_dict(tree))
    assert {r["seed"] for r in rows if r["backbone"] == "star"} == {0, 1}
    assert written(config) == before


def test_another_threshold_for_cold_evaluates_again_and_trains_nothing(finished, ray_cluster):
    config, _ = finished
    colder = config.model_copy(update={"compare": config.compare.model_copy(update={"cold_max_rows": 0})})
    before = written(config)
    report = compare(colder)
    after = written(config)
    changed = {name for name in before if before[name] != after[name]}
    assert changed and not any("safetensors" in name for name in changed)
    titles = [grid.title for grid in report.grids]
    assert "Warm users" in titles and "Cold users" not in titles  # everybody has one row there


def test_evaluations_of_older_code_and_runs_trained_otherwise(ray_cluster, tmp_path):
    config = make(str(tmp_path / "ws"), tmp_path)
    first = compare(config)
    before = written(config)
    older, otherwise = plan_comparison(config).models[0].runs[0.003]
    place = storage.join(older.run_uri, DETAIL_FILE)
    storage.write_json(place, {k: v for k, v in storage.read_json(place).items() if k != "version"})
    place = storage.join(otherwise.checkpoint_uri, "metadata.json")
    metadata = storage.read_json(place)
    assert metadata["num_threads"] == 1
    storage.write_json(place, metadata | {"world_size": 2})
    again = compare(config)
    changed = {name for name, when in written(config).items() if when != before[name]}
    assert changed == {f"{older.name}/{file}" for file in (EVALUATION_FILE, DETAIL_FILE)}
    assert again.summary["scenarios"] == first.summary["scenarios"]
    assert again.summary["trained_otherwise"] == [{"run": otherwise.name, "world_size": 2, "num_threads": 1}]
    page = storage.local_path(storage.join(again.uri, "report.html")).read_text()
    assert "threads: 1): 1 with workers: 2, threads: 1." in page


# ---------------------------------------------------------------- faults


def test_a_failed_run_is_listed_and_tried_again_and_the_others_are_kept(ray_cluster, tmp_path):
    config = make(str(tmp_path / "ws"), tmp_path, knowledge=["none", "llm"])
    _, llm = plan_comparison(config).models
    planted = block(llm.runs[0.003][1])
    report = compare(config)
    (failure,) = report.summary["failures"]
    assert failure["run"] == llm.runs[0.003][1].name and str(planted) in failure["message"]
    assert failure["details"].startswith("Traceback")
    assert not storage.is_finished(report.uri)
    page = storage.local_path(storage.join(report.uri, "report.html")).read_text()
    assert failure["run"] in page and "Failures" in page
    gains = [r["gain"] for r in report.summary["scenarios"] if r["variant"] == "llm"]
    assert [gain["num_seeds"] for gain in gains] == [1, 1, 1]

    before = written(config)
    assert len(before) == 3 * 3
    planted.unlink()
    report = compare(config)
    after = written(config)
    assert report.summary["failures"] == [] and storage.is_finished(report.uri)
    assert {name: after[name] for name in before} == before and len(after) == 3 * 4
    assert [r["gain"]["num_seeds"] for r in report.summary["scenarios"] if r["variant"] == "llm"] == [2, 2, 2]

    storage.remove(llm.runs[0.003][1].run_uri)
    block(llm.runs[0.003][1])
    report = compare(config)
    assert len(report.summary["failures"]) == 1
    assert not storage.is_finished(report.uri)  # the manifest was that of the report before


def test_a_learning_rate_that_diverges_is_not_chosen(ray_cluster, tmp_path):
    config = make(str(tmp_path / "ws"), tmp_path, seeds=[0], learning_rates=[1e6, 0.003])
    report = compare(config)
    (model,) = report.summary["models"]
    assert model["learning_rate"] == 0.003
    assert [(t["valid_auc"] is None, t["state"]) for t in model["tuning"]] == [(True, "diverged"), (False, "finished")]
    (diverged,) = report.summary["diverged"]
    assert "lower train.learning_rate" in diverged["message"] and not diverged["message"].startswith(diverged["run"])
    assert not report.summary["failures"] and storage.is_finished(report.uri)


def test_no_run_could_be_trained(ray_cluster, tmp_path):
    config = make(str(tmp_path / "ws"), tmp_path, learning_rates=[1e6, 1e7])
    with pytest.raises(TrainingError, match=r"none of 2 runs could be trained: .*lower train\.learning_rate"):
        train_all(plan_comparison(config))


def test_a_tuning_seed_that_is_none_of_the_seeds_does_not_count(ray_cluster, tmp_path):
    config = make(str(tmp_path / "ws"), tmp_path, seeds=[5], tuning_seed=9)
    report = compare(config)
    (model,) = report.summary["models"]
    assert [(run["seed"], run["chosen"]) for run in model["runs"]] == [(9, False), (5, True)]
    assert {row["num_seeds"] for row in report.summary["scenarios"]} == {1}


def test_more_than_there_is_is_refused(ray_cluster):
    for key in ("cpus", "gpus"):
        config = config_from_dict({"compare": SMALL | {f"{key}_per_run": 99}})
        with pytest.raises(ConfigError, match=f"compare.{key}_per_run: 99 are needed, this machine has"):
            run_resources(config)


def test_a_remote_workspace(ray_cluster, bucket, tmp_path):
    config = make(f"s3://{bucket}/ws", tmp_path, seeds=[0])
    report = compare(config)
    assert report.uri.startswith(f"s3://{bucket}/ws/compare-")
    names = [name.rsplit("/", 1)[-1] for name, _ in storage.list_files(report.uri)]
    assert {"report.html", "results.csv", "manifest.json", "gain_cold.png"} <= set(names)


def test_sigterm_ends_it_and_it_goes_on(ray_cluster, tmp_path):
    config = make(str(tmp_path / "ws"), tmp_path, seeds=[0, 1, 2], train={"max_epochs": 15}, max_concurrent=1)
    tasks = plan_comparison(config).models[0].runs[0.003]
    second = tasks[1]
    threading.Thread(target=terminate_after, args=(second,), daemon=True).start()
    with pytest.raises(TrainingInterrupted, match="stopped as asked after 1 of 3 runs"):
        train_all(plan_comparison(config))
    assert [is_done(task, 3) for task in tasks] == [True, False, False]
    left = world.states(second)
    assert left, "no checkpoint to go on from"
    before = written(config)
    report = compare(config)
    assert len(report.summary["models"][0]["runs"]) == 3 and report.summary["failures"] == []
    assert {name: written(config)[name] for name in before} == before


def terminate_after(task) -> None:
    processes.wait_until(lambda: world.states(task), 120, "a checkpoint of the second run")
    os.kill(os.getpid(), signal.SIGTERM)


# ---------------------------------------------------------------- as a process


RECIPE = {
    "data": {
        "kind": "synthetic",
        "split": {"timezone": "Asia/Shanghai", "valid_from": "2023-05-28", "test_from": "2023-05-29"},
        "synthetic": {"release": "small", "num_users": 60, "num_items": 100},
    },
    "knowledge": {"max_events_per_scenario": 2},
    "model": {"embedding_dim": 4, "hidden_dims": [16], "tower_dims": [8]},
    "train": {"max_epochs": 15, "patience": 30, "batch_size": 64},
    "experiment": {"seeds": [0, 1]},
    "compare": {
        "backbones": ["star"],
        "knowledge": ["none", "llm"],
        "learning_rates": [0.003],
        "reference": "none",
        "max_concurrent": 1,
    },
}


def test_failed_runs_are_an_exit_status(ray_cluster, tmp_path, monkeypatch, capsys):
    settings = {"workspace_uri": str(tmp_path / "ws")} | RECIPE | {"experiment": {"seeds": [0]}}
    settings |= {"train": RECIPE["train"] | {"max_epochs": 1}, "compare": SMALL | {"learning_rates": [1e6, 0.003]}}
    recipe = processes.write_recipe(tmp_path / "recipe.toml", settings)
    monkeypatch.setattr("sys.argv", ["compare", "--config", str(recipe)])
    assert job.main() == 0  # a learning rate that diverges is none where another one is there
    assert "failed: " not in capsys.readouterr().out
    argv = ["--config", str(recipe), "--experiment.seeds", "[0, 1]"]
    (model,) = plan_comparison(load_config(argv, environ={})).models
    planted = block(model.runs[0.003][1])
    monkeypatch.setattr("sys.argv", ["compare", *argv])
    assert job.main() == 1
    assert f"{model.runs[0.003][1].name} failed: " in capsys.readouterr().out
    assert list((tmp_path / "ws").glob("compare-*/report.html"))
    planted.unlink()
    assert job.main() == 0


@pytest.mark.slow
def test_killed_comparison_goes_on(tmp_path):
    """A killed worker's run is started again; after the driver was killed, runs that had ended are not done again."""
    root = tmp_path / "ws"
    recipe = processes.write_recipe(tmp_path / "recipe.toml", {"workspace_uri": str(root)} | RECIPE)
    ended = lambda: sorted(root.glob(f"runs/*/{DETAIL_FILE}"))  # noqa: E731
    under_way = lambda: [path.parts[-4] for path in root.glob("runs/*/training/step-*/manifest.json")]  # noqa: E731
    with processes.started("jobs.compare", recipe) as job:
        processes.wait_until(lambda: under_way() or not job.running(), 240, "a checkpoint")
        assert job.running(), job.log.read_text()
        workers = [worker for name in under_way() for worker in job.named(f"ray::{name}")]
        assert workers and not ended(), job.log.read_text()
        for worker in workers:
            worker.kill()
        processes.wait_until(lambda: len(ended()) >= 2 or not job.running(), 240, "two runs")
        processes.wait_until(lambda: under_way() or not job.running(), 60, "a checkpoint of the third")
        assert job.running(), job.log.read_text()
        job.kill("driver", random.Random(0))
        job.wait()
        assert "tries it again" not in job.log.read_text()  # what is said of a run that failed
    done = {path: path.stat().st_mtime_ns for path in ended()}
    assert 2 <= len(done) < 4 and not list(root.glob("compare-*/report.html"))
    status, printed = processes.run_job("jobs.compare", recipe)
    assert status == 0 and f"4 runs, {len(done)} done before" in printed, printed
    assert {path: path.stat().st_mtime_ns for path in done} == done and len(ended()) == 4
    (report,) = root.glob("compare-*/report.html")
    assert "All scenarios together" in printed and str(report) in printed
    assert f"python -m jobs.compare --config {recipe}" in report.read_text()
    shutil.rmtree(root)
