"""Hidden states on a GPU: tokens/s and users/s of our batches at 1.5 B and 7 B, and their share of the card's rate.

Needs torch and transformers, of this project only what plans and runs forward passes (no Ray, no configuration), so
that it runs where nothing else is installed. Weights are random at the real configurations: speed does not depend on
their values. Prompt lengths are those of real prompts (``prompt_lengths.json``); the ids are random, so tokenising is
left out. Sides, in turn:

* matmul: large bf16 products, what the card gives at best.
* batched: our batches of similar length, our forward passes, our pooling; vectors end in the host's memory.
* one_at_a_time: the same forward pass and pooling, one prompt each.
* generate: the paper's way, one prompt at a time, 64 tokens written before the state is taken.

The share counts two operations per weight and real token: neither padding nor attention is taken for work done.
Without a GPU, ``--scale 0.02`` runs everything on tiny models as a smoke test, which judges nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.harness import Goal, Result, interleave, paired_ratio, parser, rates, report
from llm4msr.knowledge.engines.forward import Reader
from llm4msr.knowledge.engines.runner import Passed, Runner

NAME = "extract_gpu"
LENGTHS_FILE = Path(__file__).parent / "prompt_lengths.json"
# The published configurations of Qwen2.5-1.5B and Qwen2.5-7B.
SHAPES = {
    "1.5B": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "7B": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
}
NUM_USERS = 24_752  # of the paper's Amazon data, which took it "less than two days"
NUM_NEW_TOKENS = 64
MATMUL_SIZE, NUM_MATMULS = 8192, 50


def real_lengths(num_prompts: int) -> list[int]:
    """Returns the lengths in tokens of `num_prompts` prompts with the distribution of the real ones, shuffled."""
    counts = json.loads(LENGTHS_FILE.read_text(encoding="utf-8"))["num_prompts_by_tokens"]
    known = np.repeat([int(length) for length in counts], list(counts.values()))
    spread = np.sort(known)[np.linspace(0, len(known) - 1, num_prompts).round().astype(int)]
    return np.random.default_rng(0).permutation(spread).tolist()


def scaled(shape: dict[str, Any], scale: float) -> dict[str, Any]:
    """Returns a smaller model of the same kind; `scale` is about the share of width and of depth that is kept."""
    if scale >= 1:
        return shape
    num_heads, num_kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    return shape | {
        "hidden_size": num_heads * max(8, 8 * round(scale * shape["hidden_size"] / num_heads / 8)),
        "intermediate_size": max(64, round(scale * shape["intermediate_size"])),
        "num_hidden_layers": max(2, round(scale * shape["num_hidden_layers"])),
        "num_key_value_heads": num_kv_heads,
        "vocab_size": 1024,
    }


def build(shape: dict[str, Any], device: str) -> Any:
    """Returns a causal LM with random bf16 weights, made on the device."""
    config = transformers.Qwen2Config(**shape, max_position_embeddings=32768, rope_theta=1e6)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    return model.eval()


def num_matmul_weights(model: Any) -> int:
    """Returns the weights that every token is multiplied by when a hidden state is wanted: no embeddings, no head."""
    return sum(p.numel() for name, p in model.model.named_parameters() if "embed_tokens" not in name)


def matmul_side(device: str, size: int) -> Callable[[], float]:
    """Returns a side that multiplies two random square bf16 matrices `NUM_MATMULS` times."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return lambda: timed(device, lambda: [a @ b for _ in range(NUM_MATMULS)])


def timed(device: str, work: Callable[[], object]) -> float:
    """Returns the seconds of `work`, the device's own included."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


class Prefill:
    """Our way and the plain way to read hidden states off one model.

    Args:
        model: The causal LM.
        device: Where it is.
        prompts: Token ids of each.
        batch_tokens: Per forward pass, padding included.
    """

    def __init__(self, model: Any, device: str, prompts: Sequence[Sequence[int]], batch_tokens: int) -> None:
        self._reader = Reader(model.model, "last_token", -1, pad_id=0, causal=True)
        self._runner = Runner(batch_tokens, torch.device(device))
        self._prompts = prompts
        self.num_computed_tokens = 0
        self.vectors: dict[int, np.ndarray] = {}

    def batched(self) -> None:
        """Reads all prompts in batches; `vectors` has their states when it is done."""
        lengths = np.array([len(ids) for ids in self._prompts])
        self.num_computed_tokens = 0

        def keep(rows: np.ndarray, vectors_BK: np.ndarray, passed: Passed, _: float) -> None:
            self.num_computed_tokens += passed.num_computed_tokens
            self.vectors.update(zip(rows.tolist(), vectors_BK, strict=True))

        def fail(row: int, reason: str, _: float) -> None:
            raise RuntimeError(f"prompt {row} failed: {reason}")

        def forward(rows: np.ndarray) -> Passed:
            return Passed(*self._reader.read([self._prompts[i] for i in rows]))

        self._runner.run(lengths, np.arange(len(lengths)), forward, keep, fail)

    def one_at_a_time(self, rows: Sequence[int]) -> list[np.ndarray]:
        """Returns the (K,) states of some prompts, each read alone."""
        return [self._reader.read([self._prompts[i]])[0][0].cpu().numpy() for i in rows]


@torch.inference_mode()
def generate(model: Any, device: str, prompts: Sequence[Sequence[int]]) -> None:
    """Takes the hidden state as the paper does: from the last of 64 tokens written, one prompt at a time."""
    for ids in prompts:
        ids_1T = torch.tensor([list(ids)], device=device)
        out = model.generate(
            ids_1T,
            attention_mask=torch.ones_like(ids_1T),
            min_new_tokens=NUM_NEW_TOKENS,
            max_new_tokens=NUM_NEW_TOKENS,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_hidden_states=True,
        )
        out.hidden_states[-1][-1][0, -1].float().cpu()


def measure(size: str, device: str, options: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Measures all sides at one size of model.

    Returns:
        Seconds of each side, and figures: rates, shares and ratios by name.
    """
    smoke = options.scale < 1
    model = build(scaled(SHAPES[size], options.scale), device)
    model.config.use_cache = False  # keys and values are of no use where nothing is written
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, model.config.vocab_size, n).tolist() for n in real_lengths(options.num_prompts)]
    by_length = np.argsort([len(ids) for ids in prompts], kind="stable")
    few, fewest = (
        by_length[(2 * np.arange(n) + 1) * len(prompts) // (2 * n)].tolist() for n in ((2, 1) if smoke else (64, 4))
    )
    prefill = Prefill(model, device, prompts, options.batch_tokens)
    matmul_size = 256 if smoke else MATMUL_SIZE
    sides = {
        "matmul": matmul_side(device, matmul_size),
        "batched": lambda: timed(device, prefill.batched),
        "one_at_a_time": lambda: timed(device, lambda: prefill.one_at_a_time(few)),
        "generate": lambda: timed(device, lambda: generate(model, device, [prompts[i] for i in fewest])),
    }
    Prefill(model, device, prompts[: 8 if smoke else 512], options.batch_tokens).batched()  # first passes are slow
    for side in ("matmul", "one_at_a_time", "generate"):
        sides[side]()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = interleave(sides, options.rounds, warm_up=False)

    num_tokens = sum(map(len, prompts))
    users = {side: rates(seconds[side], n) for side, n in (("batched", len(prompts)), ("one_at_a_time", len(few)))}
    users["generate"] = rates(seconds["generate"], len(fewest))
    matmul = rates(seconds["matmul"], 2 * matmul_size**3 * NUM_MATMULS)
    useful = rates(seconds["batched"], 2 * num_matmul_weights(model) * num_tokens)
    alone = np.stack(prefill.one_at_a_time(few)).astype(np.float64)
    together = np.stack([prefill.vectors[i] for i in few]).astype(np.float64)
    cosines = (alone * together).sum(1) / np.linalg.norm(alone, axis=1) / np.linalg.norm(together, axis=1)
    figures = {
        "matmul TFLOP/s": statistics.median(matmul) / 1e12,
        "batched tokens/s": statistics.median(rates(seconds["batched"], num_tokens)),
        **{f"{side} users/s": statistics.median(values) for side, values in users.items()},
        f"batched s for {NUM_USERS} users": NUM_USERS / statistics.median(users["batched"]),
        "padding share": 1 - num_tokens / prefill.num_computed_tokens,
        "mean tokens": num_tokens / len(prompts),
        "weights of the matrix products, billion": num_matmul_weights(model) / 1e9,
        "least cosine batched to one at a time": float(cosines.min()),
        "peak GPU memory GiB": torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0,
        "ratio share of the matmul rate": paired_ratio(useful, matmul),
        "ratio batched / one at a time": paired_ratio(users["batched"], users["one_at_a_time"]),
        "ratio batched / the paper's way": paired_ratio(users["batched"], users["generate"]),
    }
    return seconds, figures


def run(device: str, options: argparse.Namespace, not_judged: str | None) -> Result:
    """Measures all sizes and judges the goals."""
    seconds: dict[str, list[float]] = {}
    medians: dict[str, float] = {}
    ratios: dict[str, float] = {}
    for size in options.sizes:
        own_seconds, figures = measure(size, device, options)
        seconds |= {f"{size} {side}": values for side, values in own_seconds.items()}
        for name, value in figures.items():
            into, name = (ratios, name[6:]) if name.startswith("ratio ") else (medians, name)
            into[f"{size} {name}"] = value
        if device == "cuda":
            torch.cuda.empty_cache()
    config = {"benchmark": NAME, "device": device, "shapes": {size: SHAPES[size] for size in options.sizes}}
    config |= {name: getattr(options, name) for name in ("scale", "num_prompts", "batch_tokens", "rounds")}
    goals = goals_of(ratios.get("7B share of the matmul rate"), medians.get(f"7B batched s for {NUM_USERS} users"))
    return Result(config, seconds, medians, ratios, goals, not_judged)


def goals_of(share: float | None, seconds: float | None) -> tuple[Goal, ...]:
    """Returns the goals with what was measured at 7 B."""
    return (
        Goal("share of the card's measured bf16 matmul rate, 7 B", share, ">=", 0.5),
        Goal(f"{NUM_USERS:,} users at 7 B, s", seconds, "<", 600),
    )


def main() -> int:
    """Runs the benchmark from the command line."""
    arguments = parser(NAME, __doc__.splitlines()[0])
    arguments.add_argument("--scale", type=float, default=1.0, help="below 1: tiny models, a smoke test")
    arguments.add_argument("--sizes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    arguments.add_argument("--num_prompts", type=int, help="per round; default 4096, of a smoke test 16")
    arguments.add_argument("--batch_tokens", type=int, default=32768, help="per forward pass, padding included")
    arguments.add_argument("--rounds", type=int, default=3, help="of each side")
    options = arguments.parse_args()
    if options.short:
        options.scale, options.rounds = 0.02, 1
    smoke = options.scale < 1
    options.num_prompts = options.num_prompts or (16 if smoke else 4096)
    if not torch.cuda.is_available() and not smoke:
        result = Result({"benchmark": NAME}, {}, {}, {}, goals_of(None, None), "no CUDA GPU on this machine")
    else:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        result = run(device, options, "smoke test on tiny models" if smoke else None)
    report(result, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
