"""Language models and GPUs that a plan knows by name.

Weights are those that every token is multiplied by when a hidden state is wanted: no table of words, no head, no
biases. Peaks are the makers' for dense products of 16-bit numbers. Prices are assumptions.
"""

from __future__ import annotations

from dataclasses import dataclass

from llm4msr.config.plan import PlanArgs


@dataclass(frozen=True)
class ModelShape:
    """A language model.

    Attributes:
        matmul_params: Weights that every token is multiplied by.
        all_params: Those and the tables: what must fit a GPU.
        width: Length of a hidden state.
        on_gpu: Whether a plan runs it on GPUs.
        source: Where the numbers come from.
    """

    matmul_params: float
    all_params: float
    width: int
    on_gpu: bool
    source: str


def decoder(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int) -> int:
    """Returns the weights of a decoder's matrix products."""
    attention = 2 * hidden * hidden + 2 * hidden * (hidden // heads * kv_heads)
    return layers * (attention + 3 * hidden * intermediate)


_QWEN = "arithmetic over the published configuration of"
MODELS: dict[str, ModelShape] = {
    # 6 layers of 4 x 384^2 + 2 x 384 x 1536 weights.
    "minilm": ModelShape(
        6 * (4 * 384**2 + 2 * 384 * 1536), 22.7e6, 384, False, "arithmetic over the shape of all-MiniLM-L6"
    ),
    "qwen-1.5b": ModelShape(decoder(1536, 8960, 28, 12, 2), 1.54e9, 1536, True, f"{_QWEN} Qwen2.5-1.5B"),
    "qwen-7b": ModelShape(decoder(3584, 18_944, 28, 28, 4), 7.62e9, 3584, True, f"{_QWEN} Qwen2.5-7B"),
}


@dataclass(frozen=True)
class GpuKind:
    """A GPU: its name, peak FLOP/s in 16 bits, gigabytes, and an assumed price with its share of a node."""

    name: str
    peak_flops: float
    memory_gb: float
    usd_per_h: float


GPUS: dict[str, GpuKind] = {
    "h200": GpuKind("NVIDIA H200", 989e12, 141, 3.8),
    "h100": GpuKind("NVIDIA H100 80GB HBM3", 989e12, 80, 3.0),
    "a100": GpuKind("NVIDIA A100-SXM4-80GB", 312e12, 80, 1.8),
    "l4": GpuKind("NVIDIA L4", 121e12, 24, 0.7),
}


def model_of(args: PlanArgs) -> ModelShape:
    """Returns the language model of a plan."""
    if args.model_params is None or args.knowledge_width is None:
        return MODELS[args.model]
    source = "--model_params and --knowledge_width; its tables of words are taken for a tenth more"
    return ModelShape(args.model_params, 1.1 * args.model_params, args.knowledge_width, True, source)
