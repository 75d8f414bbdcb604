"""Training on a GPU: rows per second of LLM4MSR(STAR) at batch 65,536 against the card's memory bandwidth.

Runs on synthetic batches that lie on the card; nothing is fed. Needs torch, numpy and rich, and of this project the
models, which need pydantic, pydantic-settings and pyarrow (configuration and schema); no Ray, no fsspec.

The floor is the time in which the card could move the bytes that a step cannot do without, at the rate at which it
copies large tensors (bytes read plus bytes written). With B rows, n = F + T ids a row of width E, R distinct rows of
the tables, W the sum of the widths of all layers' outputs, U distinct users of knowledge width K, P dense weights, 4
bytes a number (2 an activation with bfloat16), these are:

* ids: 8 B n read.
* tables: 4 E B n read forward, as many written as gradients, as many read by the optimizer; and the optimizer reads
  and writes each touched row with its state: adam 2 x 3 x 4 E R, rowwise_adagrad 2 x (4 E + 4) R.
* activations: each written once; read once by the next layer and once in the backward pass; its gradient written once
  and read once: 5 x 4 B W.
* knowledge: 2 x 4 U K: forward, and for the gradient of the first layer.
* dense weights: 10 x 4 P: read forward and backward, gradient written and read, weight and two moments read and
  written.

Fused kernels could leave out some activations, so it is a floor of this way to compute and not of the method.
``--short`` is a smoke test on any machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.harness import Result, interleave, paired_ratio, parser, report
from llm4msr.config import ModelConfig
from llm4msr.models.llm4msr import MultiScenarioModel, build_model
from llm4msr.schema import FIRST_INDEX, Feature, FeatureSchema, Scenario
from llm4msr.training.sparse import RowWiseAdagrad, embedding_parameters

NAME = "train_gpu"
KNOWLEDGE_WIDTH = 384
TAGS_LENGTH = 5
NUM_BATCHES = 8
NUM_PROFILED, NUM_OPS = 4, 15
OPTIMIZERS: dict[str, Callable[..., Any]] = {"adam": torch.optim.SparseAdam, "rowwise_adagrad": RowWiseAdagrad}
# Side: weight form, optimizer of the tables, precision, consecutive rows of one user.
SIDES = {
    "low_rank, adam, float32": ("low_rank", "adam", "float32", 1),
    "low_rank, rowwise_adagrad, float32": ("low_rank", "rowwise_adagrad", "float32", 1),
    "low_rank, rowwise_adagrad, bfloat16": ("low_rank", "rowwise_adagrad", "bfloat16", 1),
    "low_rank, rowwise_adagrad, bfloat16, rows_per_user 16": ("low_rank", "rowwise_adagrad", "bfloat16", 16),
    "full, rowwise_adagrad, bfloat16, rows_per_user 16": ("full", "rowwise_adagrad", "bfloat16", 16),
}


def gpu_schema(num_users: int, num_items: int) -> FeatureSchema:
    """Returns the features: ids and two categorical ones of users and items, a sequence, a context feature."""
    sizes = {"user_id": num_users, "user_group": 20, "user_age": 8, "item_id": num_items, "category": 100}
    sizes |= {"author": min(5000, num_items), "tags": min(2000, num_items), "search_source": 8}
    sources = ["user"] * 3 + ["item"] * 4 + ["context"]
    return FeatureSchema(
        scenarios=(Scenario("recommendation", ""), Scenario("search", "")),
        features=tuple(
            Feature(name, "sequence", source, size + FIRST_INDEX, max_length=TAGS_LENGTH)
            if name == "tags"
            else Feature(name, "categorical", source, size + FIRST_INDEX)
            for (name, size), source in zip(sizes.items(), sources, strict=True)
        ),
        user_key_type="int64",
        item_key_type="int64",
    )


def zipf(rng: np.random.Generator, vocabulary: int, count: int) -> np.ndarray:
    """Returns ids below `vocabulary` by Zipf's law with exponent 1, popular ones scattered."""
    cumulated = np.cumsum(1 / np.arange(1, vocabulary + 1))
    rank = np.searchsorted(cumulated, rng.random(count) * cumulated[-1]).clip(max=vocabulary - 1)
    return rng.permutation(vocabulary)[rank]


@dataclass
class GpuBatch:
    """What a model reads of `llm4msr.batch.Batch`, which needs more than torch to be imported."""

    ids_BF: torch.Tensor
    numeric_BN: torch.Tensor
    sequences: tuple[torch.Tensor, ...]
    scenario_B: torch.Tensor
    label_B: torch.Tensor
    knowledge_UK: torch.Tensor
    knowledge_index_B: torch.Tensor
    item_knowledge_index_B: None = None
    histories: tuple[torch.Tensor, ...] = ()


def make_batches(schema: FeatureSchema, batch_size: int, rows_per_user: int, device: str) -> list[GpuBatch]:
    """Returns batches on the device."""
    rng = np.random.default_rng(0)
    categorical = schema.select("categorical")
    num_users, num_items = (schema.features[i].num_embeddings - FIRST_INDEX for i in (0, 3))
    items = zipf(rng, num_items, NUM_BATCHES * batch_size).reshape(NUM_BATCHES, batch_size)
    generator = torch.Generator().manual_seed(0)
    batches = []
    for item_B in items:
        user_B = np.repeat(rng.integers(0, num_users, -(-batch_size // rows_per_user)), rows_per_user)[:batch_size]
        known = {"user_id": user_B, "item_id": item_B}
        columns = [
            known[f.name] if f.name in known else rng.integers(0, f.num_embeddings - FIRST_INDEX, batch_size)
            for f in categorical
        ]
        distinct_U, index_B = np.unique(user_B, return_inverse=True)
        knowledge_UK = torch.randn(len(distinct_U) + 1, KNOWLEDGE_WIDTH, generator=generator)
        knowledge_UK[0] = 0
        tags = schema.select("sequence")[0].num_embeddings
        tensors = {
            "ids_BF": torch.from_numpy(np.stack(columns, axis=1) + FIRST_INDEX),
            "numeric_BN": torch.zeros(batch_size, 0),
            "scenario_B": torch.from_numpy(rng.integers(0, 2, batch_size)),
            "label_B": torch.from_numpy(rng.integers(0, 2, batch_size).astype(np.float32)),
            "knowledge_UK": knowledge_UK,
            "knowledge_index_B": torch.from_numpy(index_B + 1),
        }
        tags_BT = torch.from_numpy(rng.integers(0, tags, (batch_size, TAGS_LENGTH))).to(device)
        batches.append(GpuBatch(sequences=(tags_BT,), **{name: tensor.to(device) for name, tensor in tensors.items()}))
    return batches


class Stepper:
    """A model, its optimizers and its batches on one device."""

    def __init__(self, schema: FeatureSchema, side: str, batch_size: int, device: str) -> None:
        form, self.optimizer, self.precision, rows_per_user = SIDES[side]
        self.config = ModelConfig(backbone="star", meta={"weight_form": form})
        torch.manual_seed(0)
        self.model: MultiScenarioModel = build_model(schema, self.config, KNOWLEDGE_WIDTH).to(device).train()
        self.device, self.batch_size = device, batch_size
        self.batches = make_batches(schema, batch_size, rows_per_user, device)
        self.tables = embedding_parameters(self.model)
        self.dense = [p for name, p in self.model.named_parameters() if name not in self.tables]
        self._optimizers = [
            torch.optim.AdamW(self.dense, lr=1e-3, fused=True),
            OPTIMIZERS[self.optimizer](list(self.tables.values()), lr=1e-3),
        ]
        self._cycle = itertools.cycle(self.batches)

    def step(self) -> None:
        """Takes one step over the next batch."""
        batch = next(self._cycle)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bfloat16"):
            logit_B, _ = self.model(batch)
        loss = nn.functional.binary_cross_entropy_with_logits(logit_B.float(), batch.label_B)
        for optimizer in self._optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in self._optimizers:
            optimizer.step()

    def seconds_per_step(self, num_steps: int) -> float:
        """Takes some steps; returns the mean seconds of one."""
        return timed(self.device, lambda: [self.step() for _ in range(num_steps)]) / num_steps

    def bytes_per_step(self) -> dict[str, float]:
        """Returns the bytes that a step must move, by part, as the module's docstring counts them."""
        config, (batch, *_) = self.config, self.batches
        width, num_rows = config.embedding_dim, self.batch_size
        num_ids = batch.ids_BF.shape[1] + TAGS_LENGTH
        columns = [*batch.ids_BF.unbind(1), batch.sequences[0]]
        distinct = sum(len(column.unique()) for column in columns)
        input_dim = self.model.embedding.output_dim
        # x, after the user level, after normalisation; STAR's layers, its auxiliary network; the scenario level.
        widths = 3 * input_dim + sum(config.hidden_dims) + config.hidden_dims[-1] + sum(config.meta.scenario_dims) + 3
        number = 2 if self.precision == "bfloat16" else 4
        state = 2 * 3 * 4 * width if self.optimizer == "adam" else 2 * (4 * width + 4)
        return {
            "ids": 8.0 * num_rows * num_ids,
            "tables": 3.0 * 4 * width * num_rows * num_ids + state * distinct,
            "activations": 5.0 * number * num_rows * widths,
            "knowledge": 2.0 * 4 * batch.knowledge_UK.numel(),
            "dense weights": 10.0 * 4 * sum(p.numel() for p in self.dense),
        }

    def profile(self) -> dict[str, float]:
        """Returns the milliseconds a step of the operations that take most of the device's own time."""
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if self.device == "cuda":
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=kinds) as profiler:
            self.seconds_per_step(NUM_PROFILED)
        own = "self_device_time_total" if self.device == "cuda" else "self_cpu_time_total"
        found = sorted(profiler.key_averages(), key=lambda event: -getattr(event, own))
        return {event.key[:90]: getattr(event, own) / 1e3 / NUM_PROFILED for event in found[:NUM_OPS]}


def timed(device: str, work: Callable[[], object]) -> float:
    """Returns the seconds of `work`, the device's own included."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def run(device: str, options: argparse.Namespace, not_judged: str | None) -> Result:
    """Measures all sides."""
    torch.set_float32_matmul_precision("high")
    schema = gpu_schema(options.num_users, options.num_items)
    source = torch.ones(options.copy_mib * 2**18, device=device)
    target = torch.empty_like(source)
    copied_bytes = 2 * source.numel() * source.element_size()
    steppers = {side: Stepper(schema, side, options.batch_size, device) for side in SIDES}
    sides = {side: lambda s=s: s.seconds_per_step(options.num_steps) for side, s in steppers.items()}
    sides["copy"] = lambda: timed(device, lambda: [target.copy_(source) for _ in range(10)]) / 10
    seconds = interleave(sides, options.rounds)
    medians = {"copy bandwidth GB/s": copied_bytes / statistics.median(seconds["copy"]) / 1e9}
    ratios = {}
    for side, stepper in steppers.items():
        moved = stepper.bytes_per_step()
        floor_s = [s * sum(moved.values()) / copied_bytes for s in seconds["copy"]]
        ratios[f"{side}: share of the memory-bandwidth floor"] = paired_ratio(floor_s, seconds[side])
        medians[f"{side}: rows/s"] = options.batch_size / statistics.median(seconds[side])
        medians[f"{side}: distinct users in a batch"] = len(stepper.batches[0].knowledge_UK) - 1
        medians |= {f"{side}: MB a step, {part}": value / 1e6 for part, value in moved.items()}
        medians |= {f"{side}: ms a step in {op}": ms for op, ms in stepper.profile().items()}
    if device == "cuda":
        medians["peak GPU memory GiB, all sides"] = torch.cuda.max_memory_allocated() / 2**30
    config = {"benchmark": NAME, "device": device, "sides": SIDES, "knowledge_width": KNOWLEDGE_WIDTH}
    names = ("batch_size", "num_users", "num_items", "num_steps", "rounds", "copy_mib")
    config |= {name: getattr(options, name) for name in names} | {"seconds": "of one step, of one copy"}
    config["model"] = json.loads(ModelConfig(backbone="star").model_dump_json())
    return Result(config, seconds, medians, ratios, (), not_judged)


def main() -> int:
    """Runs the benchmark from the command line."""
    arguments = parser(NAME, __doc__.splitlines()[0])
    arguments.add_argument("--batch_size", type=int, default=65_536)
    arguments.add_argument("--num_users", type=int, default=100_000)
    arguments.add_argument("--num_items", type=int, default=7_000_000)
    arguments.add_argument("--num_steps", type=int, default=40, help="of a round")
    arguments.add_argument("--rounds", type=int, default=5, help="of each side")
    arguments.add_argument("--copy_mib", type=int, default=4096, help="size of the tensor that is copied")
    options = arguments.parse_args()
    if options.short:
        options.batch_size, options.num_users, options.num_items = 512, 1000, 1000
        options.num_steps, options.rounds, options.copy_mib = 2, 1, 16
    if not torch.cuda.is_available() and not options.short:
        result = Result({"benchmark": NAME}, {}, {}, {}, (), "no CUDA GPU on this machine")
    else:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        result = run(device, options, "short form" if options.short else None)
    report(result, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
