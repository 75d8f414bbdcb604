"""What a device can do: native bfloat16 on a CPU, and the peak rates that makers state for GPUs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from llm4msr.config import KnowledgeConfig
from llm4msr.knowledge.engines.interface import Device
from llm4msr.knowledge.engines.model_files import EncoderError

# Dense tensor-core peaks with 16-bit inputs, in FLOP/s, as the makers' data sheets state them (without sparsity).
# Words that must all stand in the device's name; the first match counts.
_PEAKS: tuple[tuple[str, float], ...] = (
    ("B200", 2250e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("GH200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("A40", 149.7e12),
    ("A30", 165e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
)
# Before bfloat16: these rates hold for float16 alone.
_FLOAT16_PEAKS: tuple[tuple[str, float], ...] = (("T4", 65e12), ("V100 PCIE", 112e12), ("V100", 125e12))


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Returns the dense peak rate of a GPU in FLOP/s, None where it is not known: CPUs, float32, slices of a GPU.

    Args:
        device_name: As `torch.cuda.get_device_name` gives it.
        dtype: float32, bfloat16 or float16.
    """
    words = set(re.split(r"[\s\-]+", device_name))
    if dtype == "float32" or "MIG" in words:
        return None
    known = _PEAKS + (_FLOAT16_PEAKS if dtype == "float16" else ())
    return next((peak for names, peak in known if words.issuperset(names.split())), None)


def cpu_has_bfloat16() -> bool:
    """Tells whether this CPU multiplies bfloat16 natively; without it, bfloat16 is slower than float32."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def resolve_device(device: Device) -> str:
    """Returns cuda or cpu; "auto" takes a GPU where there is one."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def resolve_dtype(config: KnowledgeConfig, device: Device = "auto") -> str:
    """Returns the dtype that "auto" means on this machine; whoever spreads work over several fixes it for all.

    bfloat16 on a GPU, and on a CPU that multiplies it natively: there the embedded sentence encoder is about 1.8 times
    as fast as in float32, its vectors within a cosine of 0.9998; else float32.

    Args:
        config: The language model.
        device: Where it will run.
    """
    if config.dtype != "auto":
        return config.dtype
    return "bfloat16" if resolve_device(device) == "cuda" or cpu_has_bfloat16() else "float32"


@contextmanager
def enough_memory(name: str, dtype: str) -> Iterator[None]:
    """Loads a model inside the block.

    Args:
        name: Of the model.
        dtype: Of its weights.

    Raises:
        EncoderError: It does not fit into the GPU's memory; the message says what helps.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        gpu = f"{torch.cuda.get_device_name()}: " if torch.cuda.is_available() else ""
        said = " ".join(str(error).split()).partition(" Of the allocated memory")[0]  # what follows is about settings
        raise EncoderError(
            f"knowledge.model {name!r} in {dtype} does not fit into the memory of the GPU ({gpu}{said}): take a "
            "smaller model, knowledge.dtype = 'bfloat16', a whole GPU for each actor (knowledge.gpus_per_actor = 1), "
            "several (knowledge.engine = 'vllm'), or knowledge.device = 'cpu'; nvidia-smi shows who else is there"
        ) from error


def count_parameters(model: torch.nn.Module) -> int | None:
    """Returns the weights that every token is multiplied with: all but tables of embeddings.

    None for a mixture of experts, of which a token passes through a share that differs from model to model.
    """
    if any("experts" in name.split(".") for name, _ in model.named_modules()):
        return None
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    return sum(p.numel() for p in model.parameters() if id(p) not in tables)
