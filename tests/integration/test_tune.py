"""Searching the learning rate: the best is found, a search that was stopped goes on, one that ended is found again."""

from __future__ import annotations

import logging
import os
import random
import signal
import threading
from types import SimpleNamespace

import job_process as processes
import pytest
import train_world as world
from job_process import write_recipe
from tiny import tiny_config

from jobs.tune import tune
from llm4msr import storage
from llm4msr.config import Config, ConfigError
from llm4msr.settings import config_from_dict, load_config
from llm4msr.training.task import TrainingError, TrainingInterrupted
from llm4msr.training.trials import draw_values, make_record, plan_search
from llm4msr.training.tune import _scheduler, search, trial_resources

# Learning rates far too low and far too high beside a good one, which is drawn first.
WIDE = {"learning_rate_range": [1e-8, 1e6], "num_trials": 3, "seed": 306}
NARROW = {"trunk_dims_choices": [[8], [8, 4]], "rank_choices": [4], "scenario_dims_choices": [[8]]}


def make(root: str, folder, num_rows: int = 1200, tuned=(), **train) -> Config:
    """A workspace, the recipe of a search in it, and its configuration."""
    world.make_workspace(root, folder, num_rows, **train)
    tree = world.tree(root, **train)
    tree["tune"] = NARROW | dict(tuned)
    write_recipe(folder / "recipe.toml", tree)
    return config_from_dict(tree)


def by_state(found) -> dict[str, dict]:
    return {trial["state"]: trial for trial in found["trials"]}


# ---------------------------------------------------------------- what is drawn


def test_learning_rates_cover_the_range_and_widths_are_tried_equally_often():
    config = tiny_config(
        tune={
            "num_trials": 12,
            "learning_rate_range": [1e-5, 10.0],
            "rank_choices": [1, 2, 3],
            "trunk_dims_choices": [[8]],
        }
    )
    drawn = draw_values(config)
    rates = sorted(values["train.learning_rate"] for values in drawn)
    for part, rate in enumerate(rates):  # half a decade each
        assert 10 ** (-5 + part / 2) * 0.999 <= rate <= 10 ** (-5 + (part + 1) / 2) * 1.001
    assert rates != [values["train.learning_rate"] for values in drawn]  # no order for ASHA to be misled by
    assert sorted(values["model.meta.rank"] for values in drawn) == [1] * 4 + [2] * 4 + [3] * 4
    assert all(values["model.meta.trunk_dims"] == [8] for values in drawn)
    assert draw_values(config) == drawn
    assert draw_values(config.model_copy(update={"tune": config.tune.model_copy(update={"seed": 1})})) != drawn


@pytest.mark.parametrize(
    ("tree", "searched"),
    [
        ({}, {"learning_rate", "trunk_dims", "rank", "scenario_dims"}),
        ({"tune": {"knowledge": "none"}}, {"learning_rate"}),
        ({"model": {"meta": {"weight_form": "full"}}}, {"learning_rate", "trunk_dims", "scenario_dims"}),
        ({"model": {"meta": {"scenario_level": False}}}, {"learning_rate", "trunk_dims", "rank"}),
    ],
)
def test_what_is_not_used_is_not_searched(tree, searched):
    assert {key.rsplit(".", 1)[-1] for values in draw_values(tiny_config(**tree)) for key in values} == searched


def test_embedding_learning_rate_follows_or_stays():
    train = {"learning_rate": 0.01, "embedding_learning_rate": 0.1}
    for values in draw_values(tiny_config(train=train)):
        assert values["train.embedding_learning_rate"] == pytest.approx(10 * values["train.learning_rate"], rel=1e-3)
    for tree in ({"train": train, "tune": {"scale_embedding_rate": False}}, {}):
        assert not any("train.embedding_learning_rate" in values for values in draw_values(tiny_config(**tree)))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"learning_rate_range": [1e-2, 1e-3]}, "learning_rate_range = [0.01, 0.001]: the first is the lowest"),
        ({"learning_rate_range": [1e-2, 1e-2]}, "learning_rate_range = [0.01, 0.01]: the first is the lowest"),
        ({"learning_rate_range": [0, 1e-2]}, "greater than 0"),
        ({"rank_choices": []}, "rank_choices = []: give at least one choice, each once"),
        ({"trunk_dims_choices": [[8], [8]]}, "trunk_dims_choices = [[8], [8]]: give at least one choice, each once"),
        ({"scenario_dims_choices": [[0]]}, "greater than or equal to 1"),
        ({"reduction_factor": 1}, "greater than 1"),
    ],
)
def test_a_section_that_cannot_be_used(section, message):
    with pytest.raises(ConfigError) as error:
        tiny_config(tune=section)
    assert message in str(error.value)


def test_choices_on_the_command_line():
    argv = [
        "--tune.trunk_dims_choices=[[8], [16, 4]]",
        "--tune.rank_choices=[2]",
        "--tune.learning_rate_range=[1e-3, 1e-2]",
    ]
    section = load_config(argv, environ={}).tune
    assert (section.trunk_dims_choices, section.rank_choices) == (((8,), (16, 4)), (2,))
    assert section.learning_rate_range == (1e-3, 1e-2)


def test_place_follows_from_what_the_result_depends_on(tmp_path):
    root = str(tmp_path / "ws")
    place = plan_search(make(root, tmp_path)).uri
    same = {"tuned": {"max_concurrent": 1, "cpus_per_trial": 2, "recipe_path": "x.toml"}, "checkpoint_every_steps": 9}
    assert plan_search(make(root, tmp_path, **same)).uri == place
    others = [{"tuned": {"grace_epochs": 1}}, {"tuned": {"num_trials": 3}}, {"max_loss": 5.0}, {"weight_decay": 0.1}]
    assert len({place, *(plan_search(make(root, tmp_path, **other)).uri for other in others)}) == 5
    sharded = make(root, tmp_path, embedding_optimizer="rowwise_adagrad", num_workers=2).model_dump(mode="json")
    sharded["model"]["embedding_sharding"] = "sharded"
    with pytest.raises(ConfigError, match=r"a trial of jobs\.tune is one process"):
        plan_search(config_from_dict(sharded))


# ---------------------------------------------------------------- ASHA


def test_a_rerun_compares_with_trials_that_have_ended(tmp_path):
    config = make(str(tmp_path / "ws"), tmp_path, tuned={"grace_epochs": 2, "reduction_factor": 2}, max_epochs=8)
    first, second, *_ = plan_search(config).trials
    ended = [make_record(trial, "finished", dict.fromkeys(range(1, 9), 0.7), "") for trial in (first, second)]
    for records, decision in (([], "CONTINUE"), (ended, "STOP")):
        scheduler, trial = _scheduler(config, records), SimpleNamespace(trial_id="new")
        scheduler.on_trial_add(None, trial)
        for epochs, expected in ((1, "CONTINUE"), (2, decision)):
            assert scheduler.on_trial_result(None, trial, {"epochs": epochs, "valid_auc": 0.6}) == expected


def test_processors_of_a_trial(ray_cluster):
    for section, num_trials, cpus in (({}, 16, 1), ({}, 2, 2), ({"max_concurrent": 1}, 8, 4), ({}, 3, 1)):
        assert trial_resources(tiny_config(tune=section), num_trials) == {"CPU": cpus}
    assert trial_resources(tiny_config(tune={"cpus_per_trial": 3}), 8) == {"CPU": 3}
    for key in ("cpus", "gpus"):
        with pytest.raises(ConfigError, match=f"tune.{key}_per_trial: 99 are needed, this machine has"):
            trial_resources(tiny_config(tune={f"{key}_per_trial": 99}), 8)


# ---------------------------------------------------------------- searches


def test_the_good_learning_rate_wins(ray_cluster, bucket, tmp_path, capsys, caplog):
    recipe = tmp_path / "found" / "best.toml"
    tuned = WIDE | {"max_concurrent": 1, "grace_epochs": 1, "reduction_factor": 2, "recipe_path": str(recipe)}
    config = make(f"s3://{bucket}/ws", tmp_path, 4000, tuned, max_epochs=3)
    with caplog.at_level(logging.INFO, logger="llm4msr"):
        found = tune(config)
        rates = [values["train.learning_rate"] for values in draw_values(config)]
        states = by_state(found)
        assert found["trials"][0]["values"]["train.learning_rate"] == rates[0]
        assert set(states) == {"finished", "stopped", "diverged"}
        best, stopped, diverged = states["finished"], states["stopped"], states["diverged"]
        assert best["valid_auc"] > stopped["valid_auc"] and best["valid_auc"] == max(auc for _, auc in best["curve"])
        assert (best["epochs"], stopped["epochs"], diverged["epochs"]) == (3, 1, 1)
        assert diverged["valid_auc"] is None and "lower train.learning_rate" in diverged["message"]
        assert [line for line in caplog.messages if line.startswith("trial 3 of 3")]

        # The recipe is the best trial's run, for every job.
        loaded = load_config(["--config", str(recipe)], environ={})
        (winner,) = [trial for trial in plan_search(config).trials if trial.task.name == best["name"]]
        assert (loaded.train, loaded.model, loaded.tune) == (
            winner.task.config.train,
            winner.task.config.model,
            config.tune,
        )
        assert loaded.data == config.data and loaded.workspace_uri == config.workspace_uri
        assert world.only_run(loaded).name == best["name"]
        assert storage.is_finished(winner.task.checkpoint_uri)

        printed = capsys.readouterr().out
        for text in ("stopped early", "diverged", f"{best['valid_auc']:.4f}", f"tensorboard --logdir {found['uri']}"):
            assert text in printed
        names = [name for name, _ in storage.list_files(found["uri"])]
        for trial in found["trials"]:
            for folder in (f"trials/{trial['name']}/tensorboard", f"tune/{trial['name']}"):
                written = any(f"{found['uri']}/{folder}/events.out" in name for name in names)
                # A remote log arrives with the first checkpoint, which a diverged trial did not write.
                assert written or (trial == diverged and folder.startswith("trials")), folder
        assert not any("/training/" in name for name in names)

        # A finished search is only told again, and its recipe written again.
        recipe.unlink()
        caplog.clear()
        assert search(config) == found
        (message,) = [record.message for record in caplog.records if record.name.startswith("llm4msr")]
        assert "already searched" in message
        assert recipe.exists()


def test_no_trial_could_be_trained(tmp_path):
    config = make(str(tmp_path / "ws"), tmp_path, tuned={"num_trials": 2, "knowledge": "none"})
    for trial in plan_search(config).trials:
        storage.write_json(trial.record_uri, make_record(trial, "diverged", {1: 0.0}, "loss is inf"))
    for _ in range(2):
        with pytest.raises(TrainingError, match=r"none of 2 trials could be trained .*; the first: loss is inf"):
            search(config)


def test_a_failed_trial_is_told_and_tried_again(ray_cluster, tmp_path):
    tuned = {"num_trials": 2, "knowledge": "none"}
    config = make(str(tmp_path / "ws"), tmp_path, tuned=tuned, max_epochs=1, max_failures=0)
    planned = plan_search(config)
    blocked, other = planned.trials
    place = storage.local_path(blocked.task.training_uri)
    place.parent.mkdir(parents=True)
    place.write_text("a file where a folder must be")
    found = search(config)
    assert [trial["state"] for trial in found["trials"]] == ["finished", "failed"]
    assert found["trials"][0]["name"] == other.task.name and str(place) in found["trials"][1]["message"]
    assert not storage.is_finished(planned.uri)
    place.unlink()
    written = storage.local_path(other.record_uri).stat().st_mtime_ns
    found = search(config)
    assert [trial["state"] for trial in found["trials"]] == ["finished", "finished"]
    assert storage.local_path(other.record_uri).stat().st_mtime_ns == written
    assert storage.is_finished(planned.uri)


def test_sigterm_ends_the_search_and_it_goes_on(ray_cluster, tmp_path):
    tuned = {"num_trials": 2, "knowledge": "none", "max_concurrent": 1}
    config = make(str(tmp_path / "ws"), tmp_path, tuned=tuned, max_epochs=1)
    first, second = plan_search(config).trials
    threading.Thread(target=terminate_after, args=(first,), daemon=True).start()
    with pytest.raises(TrainingInterrupted, match="stopped as asked after 1 of 2 trials"):
        search(config)
    written = storage.local_path(first.record_uri).stat().st_mtime_ns
    assert not storage.exists(second.record_uri)
    assert [trial["state"] for trial in search(config)["trials"]] == ["finished", "finished"]
    assert storage.local_path(first.record_uri).stat().st_mtime_ns == written


def terminate_after(trial) -> None:
    processes.wait_until(lambda: storage.exists(trial.record_uri), 120, "the first trial")
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
def test_killed_search_goes_on(tmp_path):
    """Finished trials are not repeated, the one at work goes on from its checkpoint."""
    tuned = {"num_trials": 2, "max_concurrent": 1, "grace_epochs": 3, "learning_rate_range": [1e-3, 1e-2]}
    config = make(str(tmp_path / "ws"), tmp_path, 2000, tuned, max_epochs=3)
    planned = plan_search(config)
    first, second = planned.trials
    with processes.started("jobs.tune", tmp_path / "recipe.toml") as job:
        trained = lambda: storage.list_files(storage.join(second.task.training_uri), "manifest.json")  # noqa: E731
        processes.wait_until(lambda: epochs_behind(trained()) or not job.running(), 180, "an epoch of the second trial")
        assert job.running(), job.log.read_text()
        job.kill("driver", random.Random(0))
        job.wait()
    behind = epochs_behind(trained())
    assert storage.exists(first.record_uri) and not storage.exists(second.record_uri)
    written = storage.local_path(first.record_uri).stat().st_mtime_ns
    status, printed = processes.run_job("jobs.tune", tmp_path / "recipe.toml")
    assert status == 0, printed
    assert "2 trials, 1 of them have ended" in printed and "mean valid AUC over scenarios" in printed
    assert storage.local_path(first.record_uri).stat().st_mtime_ns == written
    history = storage.read_json(storage.join(second.task.checkpoint_uri, "metadata.json"))["history"]
    assert len(behind) >= 1 and history[: len(behind)] == behind  # with the seconds they took: not trained again
    record = storage.read_json(second.record_uri)
    assert [epochs for epochs, _ in record["curve"]] == [1, 2, 3]
    assert record["valid_auc"] == max(epoch["valid_auc"] for epoch in history)
    # Of Tune's own talk nothing is left.
    assert not any(word in printed for word in ("AsyncHyperBand", "Trial status", "Current time", "Deprecat")), printed


def epochs_behind(files) -> list[dict]:
    """The epochs that the newest finished checkpoint of a training has behind it."""
    return storage.read_json(files[-1][0])["state"]["history"] if files else []
