"""jobs.status on runs: planned, interrupted, finished, evaluated, compared, searched."""

from __future__ import annotations

import os
import time

import pytest
import torch
from module_constants import constant
from test_status import LATER_S, asked, finish, later, make, row_of, rows_of
from tiny import tiny_prepared

from llm4msr import storage, workspace
from llm4msr.comparison.plan import plan_comparison, write_plan
from llm4msr.knowledge import place as knowledge_place
from llm4msr.status import planned, stages
from llm4msr.training import run as training_run
from llm4msr.training.loop import train_worker
from llm4msr.training.run import plan_runs
from llm4msr.training.task import TrainingInterrupted


def test_runs_of_other_settings_are_not_taken_for_those_planned(tmp_path):
    root = str(tmp_path / "w")
    _, tasks = make(root)
    _, others = make(root, train={"learning_rate": 0.5})
    _, without_user_level = make(root, model={"meta": {"user_level": False}})
    # The backbone alone was trained by the second of these commands, and is what the first wants.
    for task in (others[4], *without_user_level[:4], tasks[2]):
        finish(task)
    # Other meta networks make other runs of LLM4MSR, but not of the backbone alone; more workers make none.
    assert {task.name for task in tasks} & {task.name for task in without_user_level} == {t.name for t in tasks[:2]}
    everything = rows_of(root, "train")[0]
    assert everything.counts == {"complete": 6, "planned": 6} and everything.state == "stopped"
    assert everything.note.startswith("3 of the 6")
    _, slow = make(root, train={"num_workers": 2, "log_every_steps": 7}, knowledge={"rows_per_commit": 9})
    assert [task.name for task in slow] == [task.name for task in tasks]
    finish(slow[3])
    assert rows_of(root, "train")[0].note.startswith("4 of the 6")


def test_a_stopped_training_tells_how_far_it_came(tmp_path):
    root = str(tmp_path / "w")
    tiny_prepared(f"{root}/prepared/made", num_rows=400)
    config = asked(root, train={"log_every_steps": 1, "max_epochs": 3})
    config = config.model_copy(update={"experiment": config.experiment.model_copy(update={"knowledge": ("none",)})})
    storage.write_json(workspace.prepared_pointer_uri(config), {"directory": "made"})
    first, second = plan_runs(config)
    looks = iter([False] * 6 + [True] * 99)
    with pytest.raises(TrainingInterrupted):
        train_worker(first, 0, 1, torch.device("cpu"), lambda metrics: None, lambda: next(looks))
    everything, one = rows_of(root, "train")
    assert (one.state, everything.state) == ("running", "running") and one.place == f"runs/{first.name}"
    assert one.counts["epochs"] == 1 and one.counts["epochs at most"] == 3 and one.counts["steps"] == 7
    assert 0 < one.counts["valid AUC"] < 1 and everything.counts == {"running": 1, "planned": 2}
    everything, one = rows_of(root, "train", now=time.time() + LATER_S)
    assert (one.state, everything.state) == ("stopped", "stopped")
    assert row_of(root, "evaluate").state == "absent"
    train_worker(first, 0, 1, torch.device("cpu"), lambda metrics: None)
    everything, one = rows_of(root, "train")
    assert (one.state, everything.state) == ("complete", "stopped") and one.counts["epochs"] == 3
    storage.write_json(storage.join(second.run_uri, "tensorboard", "events"), {})
    assert rows_of(root, "train")[1].note == "no checkpoint yet"
    assert rows_of(root, "train")[0].counts == {"complete": 1, "running": 1, "planned": 2}


def test_an_evaluation_that_is_not_finished(tmp_path):
    root = str(tmp_path / "w")
    _, tasks = make(root)
    for task in tasks[:2]:
        finish(task)
    storage.write_json(storage.join(tasks[0].run_uri, "evaluation.json"), [])
    found = row_of(root, "evaluate")
    assert (found.state, found.counts) == ("running", {"evaluated": 1, "trained": 2})
    assert later(root, "evaluate").state == "stopped"


def test_runs_of_a_comparison_are_counted_against_its_plan(tmp_path):
    root = str(tmp_path / "w")
    changes = {"backbones": ["star", "mmoe"], "knowledge": ["none", "llm"], "learning_rates": [0.1, 0.2, 0.3]}
    config, _ = make(root, compare=changes)
    config = config.model_copy(update={"experiment": config.experiment.model_copy(update={"knowledge": ("llm",)})})
    task = plan_runs(config)[0]
    finish(task)
    storage.write_json(storage.join(task.run_uri, "evaluation_detail.json"), {})
    assert rows_of(root, "train")[0].note == (
        "1 of the 16 runs that the newest jobs.compare asked for are complete"  # 4 models, 3 rates, 1 seed more
    )


def test_a_comparison_with_failures(tmp_path):
    root = str(tmp_path)
    runs = [{"run": "a", "state": "finished"}, {"run": "b", "state": "failed"}]
    summary = {"models": [{"runs": runs}], "failures": [{"run": "b", "message": "no memory"}]}
    storage.write_json(f"{root}/compare-9/summary.json", summary | {"created_at": "2026-01-01T00:00:00+00:00"})
    found = row_of(root, "compare")
    assert (found.state, found.note) == ("failed", "b: no memory")
    assert found.counts == {"runs finished": 1, "runs failed": 1}
    storage.write_json(f"{root}/compare-8/item_mean.json", [])
    assert {row.place: row.state for row in rows_of(root, "compare")} == {"compare-8": "running", "compare-9": "failed"}


def test_a_comparison_that_is_under_way(tmp_path):
    root = str(tmp_path / "w")
    changes = {"backbones": ["star"], "knowledge": ["none", "llm"], "learning_rates": [0.1, 0.2], "tuning_seed": 0}
    config, _ = make(root, compare=changes)
    comparison = plan_comparison(config)
    write_plan(comparison)
    assert comparison.num_runs == 6  # 2 models: 2 learning rates with one seed, and the other seed at the better one
    found = row_of(root, "compare")
    assert (found.state, found.counts) == ("running", {"runs done": 0, "runs planned": 6})
    first, second = comparison.models[0].tuning.values()
    for task in (first, second):
        finish(task)
    for name in ("evaluation.json", "evaluation_detail.json"):
        storage.write_json(storage.join(first.run_uri, name), {})
    assert row_of(root, "compare").counts == {"runs done": 1, "runs planned": 6}  # the second is not evaluated yet
    # Its plan is old, but its runs are written: it is under way.
    long_ago = time.time() - 10 * LATER_S
    os.utime(storage.local_path(storage.join(comparison.uri, "plan.json")), (long_ago, long_ago))
    assert row_of(root, "compare").state == "running"
    assert later(root, "compare").state == "stopped"


def test_a_comparison_that_is_given_again_after_failures(tmp_path):
    root = str(tmp_path / "w")
    config, _ = make(root, compare={"backbones": ["star"], "knowledge": ["none", "llm"], "learning_rates": [0.1]})
    comparison = plan_comparison(config)
    write_plan(comparison)
    plan, report = (storage.local_path(storage.join(comparison.uri, name)) for name in ("plan.json", "summary.json"))
    summary = {"models": [], "failures": [{"run": "b", "message": "no memory"}], "diverged": []}
    storage.write_json(str(report), summary)
    os.utime(plan, (time.time() - 9, time.time() - 9))
    assert row_of(root, "compare").state == "failed"
    os.utime(report, (time.time() - 18, time.time() - 18))
    found = row_of(root, "compare")
    assert (found.state, found.counts) == ("running", {"runs done": 0, "runs planned": 4})
    storage.write_manifest(comparison.uri, {"kind": "comparison"})
    assert row_of(root, "compare").state == "complete"  # its report is there, whatever is done again


def test_a_search_that_is_not_finished(tmp_path):
    root = str(tmp_path)
    for trial, ended in (("a", True), ("b", True), ("c", False)):
        name = "trial.json" if ended else "tensorboard/events"
        storage.write_json(f"{root}/runs/tune-7/trials/{trial}/{name}", {})
    found = row_of(root, "tune")
    assert (found.state, found.counts) == ("running", {"trials ended": 2, "trials begun": 3})
    assert later(root, "tune").state == "stopped" and rows_of(root, "train")[0].state == "absent"


def test_names_of_other_modules_are_theirs():
    assert constant("llm4msr/training/trials.py", "TRIAL_FILE") == stages.TRIAL_FILE
    assert constant("llm4msr/comparison/plan.py", "EVALUATION_FILE") == stages.EVALUATION_FILE
    assert constant("llm4msr/comparison/plan.py", "DETAIL_FILE") == planned.DETAIL_FILE
    assert constant("llm4msr/comparison/plan.py", "PLAN_FILE") == stages.COMPARE_PLAN_FILE
    assert training_run.HOW_NOT_WHAT == planned.TRAIN_HOW
    assert set(knowledge_place._HOW) == planned.KNOWLEDGE_HOW
