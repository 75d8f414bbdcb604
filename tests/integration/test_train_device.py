"""Training on nodes that promise a GPU to Ray and have none that works: one clear line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from tiny import tiny_knowledge, tiny_prepared

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys
import ray
from tiny import tiny_config
from llm4msr.comparison.run import run_resources
from llm4msr.training.run import train
from llm4msr.training.task import TrainingError, TrainTask
from llm4msr.training.tune import trial_resources

root = sys.argv[1]
ray.init(num_cpus=4, num_gpus=2, include_dashboard=False, _node_ip_address="127.0.0.1")
for device in ("auto", "cpu", "cuda"):
    config = tiny_config(train={"device": device})
    print(device, run_resources(config), trial_resources(config, 2))
config = tiny_config(train={"device": "cuda", "num_workers": 1, "max_failures": 0})
try:
    train(TrainTask(config, f"{root}/prepared", f"{root}/knowledge", "llm", 0, f"{root}/run", "run"))
except TrainingError as error:
    print("refused:", error)
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_does_not_work(tmp_path):
    tiny_prepared(str(tmp_path / "prepared"), num_rows=400)
    tiny_knowledge().save(str(tmp_path / "knowledge"))
    folder = tempfile.mkdtemp(prefix="k", dir="/tmp")  # names of sockets are limited to about 100 bytes
    environment = os.environ | {"RAY_TMPDIR": folder}
    environment |= {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}"}
    environment.pop("RAY_ADDRESS", None)
    try:
        command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=REPOSITORY)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    assert done.returncode == 0, done.stderr[-3000:]
    # What runs and trials ask for: half of the processors beside each of the two GPUs.
    assert "auto {'num_cpus': 1, 'num_gpus': 1} {'CPU': 2, 'GPU': 1}" in done.stdout
    assert "cpu {'num_cpus': 1, 'num_gpus': 0} {'CPU': 2}" in done.stdout
    assert "cuda {'num_cpus': 1, 'num_gpus': 1} {'CPU': 2, 'GPU': 1}" in done.stdout
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("refused: ")]
    assert line.startswith("refused: run: the workers could not be started: ")
    assert line.endswith("train.device asks for a GPU: look at nvidia-smi on the nodes of the workers")
