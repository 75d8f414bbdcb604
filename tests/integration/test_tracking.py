"""Curves of training runs in a real MLflow server."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
import requests
import torch
import train_world as world
from job_process import wait_until
from mlflow import MlflowClient
from tiny import tiny_config

from llm4msr import storage
from llm4msr.training.loop import train_worker
from llm4msr.training.task import TrainingDiverged, TrainingError, TrainingInterrupted
from llm4msr.training.tracking import metric_name, trackers


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tracking")
    return world.make_workspace(str(folder / "ws"), folder, num_rows=3000)[0]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mlflow")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        str(folder / "files"),
    ]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)

    def answers():
        assert process.poll() is None, (folder / "log").read_text()[-2000:]
        try:
            return requests.get(f"http://127.0.0.1:{port}/health", timeout=2).ok
        except requests.ConnectionError:
            return False

    try:
        wait_until(answers, 180, "the MLflow server answers")
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, 9)
        process.wait()


@pytest.fixture
def client(server, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "shop 'one'")
    return MlflowClient(server)


def train(task, run, stop=lambda: False, **settings):
    tree = world.tree(task.config.workspace_uri, **settings)
    tree["knowledge"] = {"preamble": "x" * 7000}
    place = storage.join(task.config.workspace_uri, run)
    changed = replace(task, config=tiny_config(**tree), run_uri=place, name=run)
    return train_worker(changed, 0, 1, torch.device("cpu"), lambda metrics: None, stop)


def runs(client, name):
    experiment = client.get_experiment_by_name("shop 'one'")
    found = client.search_runs([experiment.experiment_id])
    return [run for run in found if run.info.run_name == name]


def points(client, run, key):
    return {point.step: point.value for point in client.get_metric_history(run.info.run_id, key)}


def test_a_run_has_its_settings_and_its_curves(task, client):
    metadata = train(task, "whole")
    (run,) = runs(client, "whole")
    assert run.info.status == "FINISHED"
    assert run.data.params["train.learning_rate"] == "0.003" and run.data.params["model.meta.rank"] == "16"
    assert run.data.params["knowledge.preamble"] == "x" * 6000
    assert run.data.tags["llm4msr.knowledge"] == "llm" and run.data.tags["llm4msr.seed"] == str(task.seed)
    history = [epoch["valid_auc"] for epoch in metadata["history"]]
    assert [value for _, value in sorted(points(client, run, "valid/auc_mean").items())] == pytest.approx(history)
    assert len(points(client, run, "train/loss")) > len(history)


def test_a_stopped_run_is_killed_there_and_goes_on_in_its_place(task, client):
    looks = iter([False] * 6 + [True] * 100)
    with pytest.raises(TrainingInterrupted):
        train(task, "resumed", lambda: next(looks))
    (run,) = runs(client, "resumed")
    assert run.info.status == "KILLED"
    before = points(client, run, "train/loss")
    metadata = train(task, "resumed")
    (run,) = runs(client, "resumed")
    assert run.info.status == "FINISHED" and len(points(client, run, "valid/auc_mean")) == len(metadata["history"])
    assert before.items() <= points(client, run, "train/loss").items()


def test_a_run_that_fails_is_failed_there(task, client):
    with pytest.raises(TrainingDiverged):
        train(task, "diverged", max_loss=1e-9)
    (run,) = runs(client, "diverged")
    assert run.info.status == "FAILED"


def test_without_its_server_training_goes_on(task, monkeypatch, caplog):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free.getsockname()[1]}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with caplog.at_level(logging.WARNING, "llm4msr.training"):
        metadata = train(task, "alone")
    warnings = [record.message for record in caplog.records if "MLflow" in record.message]
    assert len(warnings) == 1 and warnings[0].startswith(
        "alone: no more of this run goes to MLflow; TensorBoard has it:"
    )
    assert metadata["valid_auc"] > 0.5


def test_without_mlflow_the_error_says_what_to_install(task, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(TrainingError, match=r"MLFLOW_TRACKING_URI = 'http://127.0.0.1:1' is set, but MLflow is not"):
        trackers(task, 0)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert trackers(task, 0) == []


def test_names_that_mlflow_refuses():
    assert metric_name("valid/auc_25-34 (kids)") == "valid/auc_25-34 _kids_"
    assert metric_name("valid/auc_Küche") == "valid/auc_Küche"
