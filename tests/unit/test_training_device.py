"""What train.device means: with and without GPUs, for the runs of jobs.tune and jobs.compare, and in a process."""

from __future__ import annotations

import pytest
import torch

from llm4msr.config import ConfigError
from llm4msr.placement import Node, most_cpus, num_fitting
from llm4msr.training.device import device_name, gpus_per_process, on_gpu, open_device
from llm4msr.training.task import TrainingError


@pytest.mark.parametrize(
    ("wanted", "num_gpus", "expected"),
    [("auto", 0, False), ("auto", 2, True), ("cpu", 2, False), ("cuda", 0, True), ("cuda", 2, True)],
)
def test_which_device_a_cluster_trains_on(wanted, num_gpus, expected):
    assert on_gpu(wanted, num_gpus) is expected
    assert gpus_per_process(wanted, "auto", num_gpus, "key") == (1 if expected else 0)


def test_device_and_number_of_gpus_must_agree():
    assert gpus_per_process("auto", 0.5, 0, "key") == 0.5
    assert gpus_per_process("auto", 0, 2, "key") == 0
    assert gpus_per_process("cuda", 0.5, 2, "key") == 0.5
    assert gpus_per_process("cpu", 0, 2, "key") == 0
    with pytest.raises(ConfigError, match=r"compare\.gpus_per_run = 0\.5 with train\.device = 'cpu'"):
        gpus_per_process("cpu", 0.5, 2, "compare.gpus_per_run")
    with pytest.raises(ConfigError, match=r"tune\.gpus_per_trial = 0 with train\.device = 'cuda'"):
        gpus_per_process("cuda", 0, 2, "tune.gpus_per_trial")


def test_a_process_without_the_gpu_that_it_shall_have(monkeypatch):
    assert open_device(False) == torch.device("cpu")
    assert device_name(open_device(False)) == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(TrainingError, match=r"train\.device: a GPU is asked for, and this process on .* sees none"):
        open_device(True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert open_device(True) == torch.device("cuda")


@pytest.mark.parametrize(
    ("nodes", "cpus", "gpus", "fitting"),
    [
        ([], 1, 0, 0),
        ([(8, 0), (3, 0)], 2, 0, 5),
        ([(8, 0), (3, 2)], 2, 1, 1),  # by its processors
        ([(8, 1), (8, 3)], 1, 2, 1),  # two of one node
        ([(8, 2)], 1, 0.4, 4),  # two on each
    ],
)
def test_how_many_processes_fit(nodes, cpus, gpus, fitting):
    assert num_fitting([Node(*node) for node in nodes], cpus, gpus) == fitting


@pytest.mark.parametrize(
    ("nodes", "num_processes", "gpus", "limit", "cpus"),
    [
        ([(8, 0), (4, 0)], 3, 0, None, 4),
        ([(8, 0)], 1, 0, 6, 6),
        ([(64, 0), (4, 2)], 2, 1, 8, 2),  # the large node has no GPU
        ([(64, 0)], 2, 1, 8, 1),  # nodes with GPUs are yet to be started
        ([(4, 0)], 9, 0, None, 1),
        ([], 1, 0, None, 1),
    ],
)
def test_processors_that_let_all_fit(nodes, num_processes, gpus, limit, cpus):
    assert most_cpus([Node(*node) for node in nodes], num_processes, gpus, limit) == cpus
