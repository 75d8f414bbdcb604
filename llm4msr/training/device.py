"""Where a run trains: what ``train.device`` means on a cluster, and the device that one process takes.

Knows no Ray: who starts processes says what the cluster has, and gives those that shall have a GPU one.
"""

from __future__ import annotations

import platform
from typing import Literal

import torch

from llm4msr.config import ConfigError
from llm4msr.training.task import TrainingError

Wanted = Literal["auto", "cpu", "cuda"]


def on_gpu(wanted: Wanted, num_gpus: int) -> bool:
    """Tells whether training takes GPUs.

    Args:
        wanted: As ``train.device``: cuda also takes those that an autoscaler has yet to start.
        num_gpus: GPUs of the cluster now.
    """
    return wanted == "cuda" or (wanted == "auto" and num_gpus > 0)


def gpus_per_process(wanted: Wanted, configured: float | Literal["auto"], num_gpus: int, key: str) -> float:
    """Returns the GPUs of each of many single-process runs.

    Args:
        wanted: As ``train.device``.
        configured: The value of `key`; auto: one where training takes GPUs.
        num_gpus: GPUs of the cluster now.
        key: Of the configuration, for the message.

    Raises:
        ConfigError: Device and number contradict each other.
    """
    if configured == "auto":
        return int(on_gpu(wanted, num_gpus))
    if (wanted == "cpu" and configured) or (wanted == "cuda" and not configured):
        raise ConfigError(
            f"{key} = {configured:g} with train.device = {wanted!r}: set one of them to 'auto', or both to the same"
        )
    return configured


def open_device(gpu: bool) -> torch.device:
    """Returns the device that this process trains on.

    Raises:
        TrainingError: It shall be a GPU, and this process sees none.
    """
    if gpu and not torch.cuda.is_available():
        built = "" if torch.backends.cuda.is_built() else ": its torch is built without CUDA"
        raise TrainingError(
            f"train.device: a GPU is asked for, and this process on {platform.node()} sees none{built}; look at "
            "nvidia-smi and CUDA_VISIBLE_DEVICES there, give train.num_workers where other nodes have GPUs, or take "
            "train.device = 'cpu'"
        )
    return torch.device("cuda" if gpu else "cpu")


def device_name(device: torch.device) -> str:
    """Returns what a run says that it was computed on: the GPU's name, or cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
