"""Runs that must be the same run: straight or interrupted, on one worker or two, in parts, whatever stopped them."""

from __future__ import annotations

import itertools
import json
import logging
import random
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import train_world as world
from tiny import tiny_config, tiny_knowledge

from llm4msr import storage
from llm4msr.evaluation import evaluate_checkpoint
from llm4msr.models.llm4msr import MultiScenarioModel
from llm4msr.training.loop import train_worker
from llm4msr.training.state import take_over
from llm4msr.training.task import TrainingDiverged, TrainingError, TrainingInterrupted
from llm4msr.training.trainer import Trainer

NO_DROPOUT = {"dropout": 0.0, "meta": {"knowledge_dropout": 0.0}}


def changed(task, run, model=None, **train):
    """The same task with other settings, in another place."""
    tree = world.tree(task.config.workspace_uri, **train)
    tree["model"] |= model or {}
    config = tiny_config(**tree)
    return replace(task, config=config, run_uri=storage.join(task.config.workspace_uri, run), name=run)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    return world.make_workspace(str(folder / "ws"), folder, num_rows=3000)[0]


def alone(task, stop_after=None, preempted=lambda: False):
    """Trains in this process; `stop_after` looks it is asked to stop."""
    looks = itertools.count(1)
    stop = (lambda: False) if stop_after is None else (lambda: next(looks) >= stop_after)
    return train_worker(task, 0, 1, torch.device("cpu"), lambda metrics: None, stop, preempted)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"embedding_optimizer": "rowwise_adagrad", "accumulate_steps": 2},
        {
            "embedding_optimizer": "dense_adam",
            "embedding_weight_decay": 1e-3,
            "average_steps": 20,
            "log_every_steps": 1,
        },
    ],
)
def test_interrupted_again_and_again_it_ends_as_if_it_had_not_been(task, settings):
    """Bit by bit: the weights of the best epoch, the metrics of all."""
    straight = changed(task, f"straight{len(settings)}", **settings)
    alone(straight)
    broken = replace(changed(task, f"broken{len(settings)}", **settings), name=straight.name)
    chance = random.Random(3)
    stops = 0
    for _ in range(40):
        try:
            alone(broken, stop_after=chance.randint(1, 8))
        except TrainingInterrupted as error:
            stops += 1
            place = r"step-\d{9}-epoch-\d{5}$"
            assert re.search(
                rf"stopped as asked at epoch \d, step \d+; the same command goes on from .*/{place}", str(error)
            )
        else:
            break
    assert stops >= 5
    assert world.outcome(broken) == world.outcome(straight)
    assert world.weights(broken) == world.weights(straight)
    assert not storage.exists(broken.training_uri)


def test_what_was_done_after_the_last_checkpoint_is_done_again(task):
    """Killed without warning, which leaves the checkpoint of an earlier step: the same end."""
    straight = changed(task, "straight-kill")
    alone(straight)
    killed = replace(changed(task, "killed"), name=straight.name)

    class Killed(BaseException):
        pass

    def kill(metrics):
        if metrics["epoch"] == 1:
            raise Killed

    with pytest.raises(Killed):
        train_worker(killed, 0, 1, torch.device("cpu"), kill)
    newest = storage.join(killed.training_uri, world.states(killed)[-1])
    storage.remove(storage.join(newest, "model.safetensors"))  # the last one is damaged on top
    alone(killed)
    assert world.outcome(killed) == world.outcome(straight)
    assert world.weights(killed) == world.weights(straight)


def test_a_preemption_writes_a_checkpoint_and_training_goes_on(task, monkeypatch, caplog):
    monkeypatch.setattr("llm4msr.training.running.PREEMPTION_CHECK_S", 0.0)
    run = changed(task, "preempted", checkpoint_every_steps=100_000)
    seen = []

    def preempted():
        seen.append(world.states(run))
        return len(seen) == 2

    alone(run, preempted=preempted)
    assert seen[:2] == [[], []] and seen[2] == ["step-000000010-epoch-00000"]


# ---------------------------------------------------------------- workers


def work(rank, world_size, task, store, stop_after):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    looks = itertools.count(1)
    try:
        train_worker(
            task,
            rank,
            world_size,
            torch.device("cpu"),
            lambda metrics: None,
            lambda: rank == world_size - 1 and stop_after is not None and next(looks) >= stop_after,
        )
    except TrainingInterrupted:
        assert stop_after is not None
    dist.destroy_process_group()


def group(task, world_size, tmp_path, stop_after=None):
    store = tmp_path / f"store-{task.name}-{stop_after}"
    mp.spawn(work, (world_size, task, str(store), stop_after), nprocs=world_size)


def assert_same_losses(found: list[float], expected: list[float]) -> None:
    """Each within 1e-5, and not all on one side: rounding has no direction, a wrong weight of a share has."""
    found, expected = np.array(found), np.array(expected)
    assert found.shape == expected.shape and len(found) > 50
    np.testing.assert_allclose(found, expected, atol=1e-5)
    difference = found - expected
    if (different := difference[difference != 0]).size >= 20:
        assert 0.1 < (different > 0).mean() < 0.9


@pytest.mark.parametrize("settings", [{}, {"accumulate_steps": 2, "embedding_l2": 0.01}, {"rows_per_user": 4}])
def test_one_worker_with_64_rows_is_two_with_32(task, tmp_path, settings):
    settings = settings | {"log_every_steps": 1, "max_epochs": 2, "embedding_optimizer": "rowwise_adagrad"}
    one = changed(task, f"one-{len(settings)}-{tmp_path.name}", NO_DROPOUT, **settings)
    two = changed(task, f"two-{len(settings)}-{tmp_path.name}", NO_DROPOUT, **settings)
    alone(one)
    group(two, 2, tmp_path)
    assert_same_losses(world.step_losses(two), world.step_losses(one))
    for a, b in zip(world.outcome(one)["history"], world.outcome(two)["history"], strict=True):
        assert a["valid_auc"] == pytest.approx(b["valid_auc"], abs=2e-3)
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)


def test_two_workers_stopped_then_three_then_one(task, tmp_path):
    """The batch and its order stay as the group changes; three workers take unequal shares of eight lanes."""
    settings = {"log_every_steps": 1, "max_epochs": 2, "embedding_optimizer": "rowwise_adagrad"}
    one = changed(task, "elastic-one", NO_DROPOUT, **settings)
    alone(one)
    many = replace(changed(task, "elastic-many", NO_DROPOUT, **settings), name=one.name)
    group(many, 2, tmp_path, stop_after=10)
    assert world.states(many)[-1] == "step-000000010-epoch-00000"
    group(many, 3, tmp_path, stop_after=25)
    assert world.states(many)[-1] == "step-000000035-epoch-00001"
    alone(many)
    assert_same_losses(world.step_losses(many), world.step_losses(one))


def test_sharded_tables_stopped_on_two_workers_go_on_on_one(task, tmp_path):
    pytest.importorskip("torchrec")
    settings = {"log_every_steps": 1, "max_epochs": 2, "embedding_optimizer": "rowwise_adagrad"}
    plain = changed(task, "sharded-plain", NO_DROPOUT, **settings)
    alone(plain)
    model = NO_DROPOUT | {"embedding_sharding": "sharded"}
    sharded = replace(changed(task, "sharded", model, num_workers=2, **settings), name=plain.name)
    group(sharded, 2, tmp_path, stop_after=40)
    assert world.states(sharded)[-1] == "step-000000040-epoch-00001"
    group(sharded, 1, tmp_path)
    assert_same_losses(world.step_losses(sharded), world.step_losses(plain))


def test_any_order_of_knowledge_rows_is_the_same_run(task):
    table = tiny_knowledge()
    order = np.random.default_rng(1).permutation(len(table.users_NK) - 1) + 1
    place = np.argsort(np.r_[0, order]).astype(np.int32)
    mixed = replace(table, users_NK=table.users_NK[np.r_[0, order]], user_index_N=place[table.user_index_N])
    np.testing.assert_array_equal(mixed.users_NK[mixed.user_index_N], table.users_NK[table.user_index_N])
    mixed.save(storage.join(task.config.workspace_uri, "mixed"))
    first = changed(task, "order-first", NO_DROPOUT, log_every_steps=1, max_epochs=2)
    second = replace(
        changed(task, "order-second", NO_DROPOUT, log_every_steps=1, max_epochs=2),
        knowledge_uri=storage.join(task.config.workspace_uri, "mixed"),
    )
    alone(first)
    alone(second)
    assert_same_losses(world.step_losses(second), world.step_losses(first))


# ---------------------------------------------------------------- what cannot go on


def test_an_exploding_loss_names_step_scenario_and_the_last_good_checkpoint(task):
    run = changed(task, "exploding", learning_rate=0.5, max_loss=0.8, checkpoint_every_steps=5, log_every_steps=5)
    with pytest.raises(TrainingError) as stop:
        alone(run)
    match = re.search(
        r"loss is (\S+) at epoch (\d), step (\d+) \(by scenario: \{(.*)\}; train.max_loss is 0.8\); "
        r"lower train.learning_rate \(now 0.5\), which makes a new run; last good checkpoint: (.*)$",
        str(stop.value),
    )
    assert match, stop.value
    loss, _, step, guilty, last = match.groups()
    assert (float(loss) > 0.8 and "'rec'" in guilty) or "'search'" in guilty
    if last != "none yet":
        assert storage.is_finished(last) and world.step_of(last) < int(step)


def test_weights_that_overflow_are_never_saved(task):
    """The loss of a step is that of the weights before it: only a look at the weights shows what the step made."""
    run = changed(task, "overflow", max_epochs=1, checkpoint_every_steps=5)

    def spoil(trainer, batches, rows):
        losses = step(trainer, batches, rows)
        trainer.count = getattr(trainer, "count", 0) + 1
        if trainer.count == 10:
            next(iter(trainer.model.parameters())).data[3] = float("inf")
        return losses

    step = Trainer.step
    with pytest.MonkeyPatch.context() as patch, pytest.raises(TrainingDiverged) as stop:
        patch.setattr(Trainer, "step", spoil)
        alone(run)
    assert re.search(
        r"weights are not finite after step 10: embedding.tables.0.weight; .*/step-000000005-", str(stop.value)
    )
    assert world.states(run) == ["step-000000005-epoch-00000"]


@pytest.mark.parametrize(("batch", "text"), [(7, "loss is nan"), (10_000, "scores of valid are not finite")])
def test_what_is_not_a_number_is_told(task, batch, text):
    """In the loss of a step, and in the scores of valid alone."""
    run = changed(task, f"nan-{batch}", max_epochs=1, checkpoint_every_steps=5)
    counted = itertools.count(1)
    forward = MultiScenarioModel.forward

    def spoil(model, data):
        logit_B, norm_B = forward(model, data)
        wrong = next(counted) == batch if model.training else batch == 10_000
        return (logit_B * float("nan"), norm_B) if wrong else (logit_B, norm_B)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(TrainingDiverged) as stop:
        patch.setattr(MultiScenarioModel, "forward", spoil)
        alone(run)
    assert text in str(stop.value)
    if batch == 7:
        assert "at epoch 0, step 7 (by scenario: {'rec': nan, 'search': nan}" in str(stop.value)
        assert "last good checkpoint" in str(stop.value) and "/step-000000005-epoch-00000" in str(stop.value)


def test_who_started_last_writes(task):
    """A killed driver's worker that still trains ends at its next checkpoint, and takes nothing away."""
    run = changed(task, "two-writers")

    def started_elsewhere(metrics):
        take_over(run.training_uri)

    with pytest.raises(storage.StorageError, match="another process has taken over this training; this one ends"):
        train_worker(run, 0, 1, torch.device("cpu"), started_elsewhere)
    assert world.states(run)


def test_a_finished_run_is_left_alone(task):
    """Ray Train starts a group again whose worker dies after the last line."""
    run = changed(task, "finished-twice", max_epochs=1)
    first = alone(run)
    before = storage.fingerprint(storage.join(run.checkpoint_uri, "model.safetensors"))
    assert alone(run) == json.loads(json.dumps(first))
    assert storage.fingerprint(storage.join(run.checkpoint_uri, "model.safetensors")) == before


def test_too_few_rows(tmp_path):
    few, _ = world.make_workspace(str(tmp_path / "ws"), tmp_path, num_rows=8)
    with pytest.raises(TrainingError, match=r"rows.*lanes"):
        alone(few)


def test_a_run_says_where_it_goes_on(task, caplog):
    run = changed(task, "says")
    with pytest.raises(TrainingInterrupted):
        alone(run, stop_after=3)
    with caplog.at_level(logging.INFO, "llm4msr.training"):
        alone(run)
    assert re.search(
        r"says: going on from .*/says/training/step-000000015-epoch-00000: epoch 0, step 15 of 33", caplog.text
    )


def test_metrics_on_the_way_are_the_exact_ones(task):
    """AUC within its bins, GAUC and log loss as evaluation finds them with all scores at hand."""
    run = changed(task, "metrics", max_epochs=3)
    alone(run)
    found = world.outcome(run)
    best = found["history"][found["best_epoch"]]
    exact = {
        r["scenario"]: r for r in evaluate_checkpoint(run.checkpoint_uri, run.prepared_uri) if r["split"] == "valid"
    }
    assert 0 < best["valid_auc_bound"] < 1e-3
    for name in ("rec", "search"):
        assert best["valid_auc_by_scenario"][name] == pytest.approx(exact[name]["auc"], abs=best["valid_auc_bound"])
        assert best["valid_gauc_by_scenario"][name] == pytest.approx(exact[name]["gauc"], abs=1e-6)
        assert best["valid_log_loss_by_scenario"][name] == pytest.approx(exact[name]["log_loss"], rel=1e-5)
