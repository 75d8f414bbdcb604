"""Runs in a group of Ray Train: sharded tables, options of a step, and a group that shrinks."""

from __future__ import annotations

import re
import shutil
import tempfile

import job_process as processes
import numpy as np
import psutil
import pytest
import torch
import train_world as world
from test_train_resume import alone, assert_same_losses, changed

from llm4msr import storage
from llm4msr.config import ConfigError
from llm4msr.evaluation import evaluate_checkpoint
from llm4msr.training.checkpoint import load_checkpoint
from llm4msr.training.run import train
from llm4msr.training.task import TrainingError

NO_DROPOUT = {"dropout": 0.0, "meta": {"knowledge_dropout": 0.0}}
ROW_WISE = {"embedding_optimizer": "rowwise_adagrad", "max_epochs": 2, "log_every_steps": 1, "cpus_per_worker": 1}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("group")
    return world.make_workspace(str(folder / "ws"), folder, num_rows=3000)[0]


def test_sharded_tables_train_the_same_model(task, ray_cluster):
    """Two workers, half of each table on each: the checkpoint is an ordinary one, and serves without TorchRec."""
    pytest.importorskip("torchrec")
    replicated = changed(task, "replicated", NO_DROPOUT, **ROW_WISE)
    sharded = changed(task, "sharded", NO_DROPOUT | {"embedding_sharding": "sharded"}, num_workers=2, **ROW_WISE)
    alone(replicated)
    metadata = train(sharded)
    assert metadata["world_size"] == 2
    assert_same_losses(world.step_losses(sharded), world.step_losses(replicated))
    ours, theirs = world.outcome(sharded), world.outcome(replicated)
    assert ours["num_parameters"] == theirs["num_parameters"]
    for a, b in zip(ours["history"], theirs["history"], strict=True):
        assert a["valid_auc"] == pytest.approx(b["valid_auc"], abs=2e-3)
    first, second = (load_checkpoint(run.checkpoint_uri).model.state_dict() for run in (sharded, replicated))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], atol=2e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_sharded_tables_need_workers(task, ray_cluster):
    model = {"embedding_sharding": "sharded"}
    with pytest.raises(ConfigError, match=r"needs train.num_workers of at least 1, found 0"):
        train(changed(task, "no-workers", model, **ROW_WISE | {"num_workers": "auto"}))


@pytest.mark.parametrize("option", [{"precision": "bfloat16"}, {"accumulate_steps": 4}])
def test_options_reach_the_same_quality(task, option):
    plain = changed(task, "plain", learning_rate=0.01, max_epochs=3)
    other = changed(task, f"with-{next(iter(option))}", learning_rate=0.01, max_epochs=3, **option)
    found = []
    for run in (plain, other):
        if not storage.is_finished(run.checkpoint_uri):
            alone(run)
        rows = evaluate_checkpoint(run.checkpoint_uri, run.prepared_uri)
        found.append(next(r["auc"] for r in rows if (r["split"], r["scenario"]) == ("test", "all")))
    assert found[1] == pytest.approx(found[0], abs=0.05)
    assert world.step_losses(plain) != world.step_losses(other)


@pytest.mark.slow
def test_a_compiled_model_trains_the_same(task):
    """Needs a C++ compiler, as torch.compile does."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++, which torch.compile calls")
    eager = changed(task, "eager", NO_DROPOUT, max_epochs=1, log_every_steps=1)
    compiled = changed(task, "compiled", NO_DROPOUT, max_epochs=1, log_every_steps=1, compile=True)
    alone(eager)
    alone(compiled)
    np.testing.assert_allclose(world.step_losses(compiled), world.step_losses(eager), atol=1e-4)


def test_an_exploding_loss_is_not_tried_again(task, ray_cluster):
    run = changed(task, "exploding-group", learning_rate=1e4, num_workers=2, cpus_per_worker=1)
    with pytest.raises(TrainingError, match=r"loss is \S+ at epoch 0, step \d+ \(by scenario: "):
        train(run)
    assert not storage.exists(run.checkpoint_uri)


@pytest.mark.slow
def test_a_group_that_loses_a_node_goes_on_smaller(tmp_path, monkeypatch):
    """Two nodes as processes of this machine, a worker on each; the second goes without a word."""
    from ray.cluster_utils import Cluster

    settings = {"num_workers": [1, 2], "cpus_per_worker": 1, "max_epochs": 8, "checkpoint_every_steps": 25}
    task, path = world.make_workspace(str(tmp_path / "ws"), tmp_path, 8000, **settings)
    monkeypatch.setenv("PYTHONPATH", str(processes.REPOSITORY))  # of the second node's workers
    for name, value in (("INITIAL_DELAY_MS", "1000"), ("PERIOD_MS", "500"), ("FAILURE_THRESHOLD", "4")):
        monkeypatch.setenv(f"RAY_health_check_{name.lower()}", value)
    folder = tempfile.mkdtemp(prefix="n", dir="/tmp")  # Unix socket names are limited to about 100 bytes
    cluster = Cluster(True, head_node_args={"num_cpus": 1, "include_dashboard": False, "temp_dir": folder})
    try:
        lost = cluster.add_node(num_cpus=1)
        with processes.started("jobs.train", path, RAY_ADDRESS=cluster.address) as job:
            begun = lambda: world.states(task) or not job.running()  # noqa: E731
            processes.wait_until(begun, 120, "a checkpoint")
            assert job.running(), job.log.read_text()
            raylet = psutil.Process(lost.all_processes["raylet"][0].process.pid)
            assert processes.titled("RayTrainWorker", raylet.children())
            cluster.remove_node(lost, allow_graceful=False)
            status = job.wait(300)
            printed = job.log.read_text()
            assert status == 0, printed
    finally:
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
    assert re.search(r"going on from \S+/step-\d{9}-epoch-\d{5}: epoch \d", printed)
    found = world.outcome(task)
    assert len(found["history"]) == 8
    metadata = storage.read_json(storage.join(task.checkpoint_uri, "metadata.json"))
    assert metadata["world_size"] == 1
