"""Processes of a training are killed, or asked to stop: the rerun goes on and ends as if nothing had been."""

from __future__ import annotations

import os
import random
import re
import signal
import time

import job_process as processes
import pytest
import train_world as world

from llm4msr import storage
from llm4msr.training.run import train

pytestmark = pytest.mark.slow

WORKER = "RayTrainWorker"
# Some 440 steps, a checkpoint each 25: long enough for kills at random moments of each start.
TRAIN = {"max_epochs": 4, "num_workers": 2, "cpus_per_worker": 1, "checkpoint_every_steps": 25}
NUM_ROWS = 10_000


@pytest.fixture
def chance() -> random.Random:
    """Another seed each time; TRAIN_KILL_SEED repeats one. pytest shows it where a test fails."""
    seed = int(os.environ.get("TRAIN_KILL_SEED", time.time_ns() % 1_000_000))
    print(f"\nTRAIN_KILL_SEED={seed}")
    return random.Random(seed)


def uninterrupted(tmp_path, **settings):
    """The same run, left in peace."""
    folder = tmp_path / "peace"
    folder.mkdir()
    task, _ = world.make_workspace(str(folder / "ws"), folder, NUM_ROWS, **settings)
    train(task)
    return task


def newest_step(task) -> int:
    found = world.states(task)
    return world.step_of(found[-1]) if found else 0


@pytest.mark.parametrize(
    ("place", "num_workers", "kills"),
    [("local", 0, ("driver", "driver")), ("s3", 2, (WORKER, "driver", "everything"))],
)
def test_killed_at_random_moments(place, num_workers, kills, ray_cluster, tmp_path, chance, request):
    root = str(tmp_path / "ws") if place == "local" else f"s3://{request.getfixturevalue('bucket')}/ws"
    settings = TRAIN | {"num_workers": num_workers}
    task, path = world.make_workspace(root, tmp_path, NUM_ROWS, **settings)
    logs, at_kill = run_until_finished(task, path, chance.sample(kills, len(kills)), chance)
    resumed = [int(step) for step in re.findall(r"going on from \S+/step-(\d{9})", "\n".join(logs))]
    print(f"newest checkpoint at each kill {at_kill}, gone on from {resumed}")
    # Each start goes on from the newest checkpoint there was when the one before it was killed, or from a later one.
    assert len(resumed) == len(kills)
    assert all(found >= left for found, left in zip(resumed, at_kill, strict=True))
    peace = uninterrupted(tmp_path, **settings)
    assert world.outcome(task) == world.outcome(peace)
    assert world.weights(task) == world.weights(peace)
    assert not storage.exists(task.training_uri)


def run_until_finished(task, path, kills, chance):
    """Runs the job, kills it after further checkpoints; returns what each start printed and its newest step then."""
    waiting, logs, at_kill = list(kills), [], []
    while True:
        with processes.started("jobs.train", path) as job:
            while waiting:
                before = newest_step(task)
                moved_on = lambda n=before, j=job: newest_step(task) > n or not j.running()  # noqa: E731
                processes.wait_until(moved_on, 90, "a checkpoint")
                assert job.running(), f"it ended before it was killed:\n{job.log.read_text()}"
                time.sleep(chance.uniform(0, 0.4))
                kind = waiting.pop(0)
                at_kill.append(newest_step(task))
                job.kill(kind, chance)
                print(f"killed {kind} after step {at_kill[-1]}")
                if kind != WORKER:
                    assert job.wait() != 0
                    break
            else:
                status = job.wait()
                assert status == 0, job.log.read_text()
                return [*logs, job.log.read_text()], at_kill
            logs.append(job.log.read_text())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_sigterm_writes_a_checkpoint_first(num_workers, ray_cluster, tmp_path):
    """Far from the next checkpoint that is due, the step it was in is not lost."""
    settings = TRAIN | {"num_workers": num_workers, "checkpoint_every_steps": 100_000, "max_epochs": 6}
    task, path = world.make_workspace(str(tmp_path / "ws"), tmp_path, NUM_ROWS, **settings)
    with processes.started("jobs.train", path) as job:
        processes.wait_until(lambda: newest_step(task) or not job.running(), 90, "the end of the first epoch")
        first = newest_step(task)
        job.driver.send_signal(signal.SIGTERM)
        assert job.wait(60) == 143, job.log.read_text()
        printed = job.log.read_text()
    assert "SIGTERM: stopping; what was done is kept" in printed
    found = re.search(r"jobs.train: star-llm-seed0-\w+: stopped as asked at epoch (\d), step (\d+)", printed)
    assert found, printed
    assert newest_step(task) == int(found[2]) >= first
    status, printed = processes.run_job("jobs.train", path)
    assert status == 0, printed
    assert f"/step-{int(found[2]):09d}-epoch-{int(found[1]):05d}: epoch {found[1]}" in printed
    assert len(world.outcome(task)["history"]) == 6


def test_a_worker_that_dies_too_often_ends_the_job(ray_cluster, tmp_path, chance):
    task, path = world.make_workspace(str(tmp_path / "ws"), tmp_path, NUM_ROWS, **TRAIN | {"max_failures": 0})
    with processes.started("jobs.train", path) as job:
        processes.wait_until(lambda: newest_step(task) or not job.running(), 90, "a checkpoint")
        job.kill(WORKER, chance)
        assert job.wait(60) != 0
    assert newest_step(task) > 0 and not storage.exists(task.checkpoint_uri)
