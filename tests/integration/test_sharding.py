"""Sharded tables against replicated ones: the same training, the same files, for one worker and for two."""

from __future__ import annotations

import copy
import dataclasses
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny import tiny_config, tiny_prepared, tiny_schema
from torch.nn.parallel import DistributedDataParallel

from llm4msr.batch import Batch, Collator, EntityFeatures
from llm4msr.config import ConfigError
from llm4msr.data.prepared import PreparedData
from llm4msr.models.embedding import FeatureEmbedding
from llm4msr.models.llm4msr import MultiScenarioModel, build_model
from llm4msr.schema import FeatureSchema
from llm4msr.training.reader import list_row_groups, read_row_group
from llm4msr.training.sparse import RowWiseAdagrad, average_sparse_gradients, embedding_parameters

STEPS, ROWS, RATE = 6, 80, 0.1


class Training:
    """A few steps on this worker's part of each step's rows."""

    def __init__(self, uri: str, sharded: bool, uneven: bool = False) -> None:
        prepared = PreparedData.open(uri)
        users, items = (
            EntityFeatures.from_table(t, prepared.schema, s)
            for t, s in ((prepared.users(), "user"), (prepared.items(), "item"))
        )
        self.collator = Collator(prepared.schema, users, items, None)
        self.rows = [read_row_group(group) for group in list_row_groups(prepared.files("train"))]
        self.rank, self.world_size, self.sharded = dist.get_rank(), dist.get_world_size(), sharded
        self.shares = np.array([1.0]) if self.world_size == 1 else np.array([0.75, 0.25] if uneven else [0.5, 0.5])
        self.model = build(prepared.schema, sharded)
        if sharded:
            from llm4msr.training import sharding

            sharding.BLOCK_ROWS = 7  # several messages a table
            sharding.shard_embedding(self.model, torch.device("cpu"), RATE)
        self.tables = embedding_parameters(self.model)
        dense = [p for name, p in self.model.named_parameters() if name not in self.tables]
        self.optimizers = [torch.optim.AdamW(dense, lr=0.01)]
        if not sharded:
            self.optimizers.append(RowWiseAdagrad(self.tables.values(), lr=RATE))
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.model, list(self.tables))
        self.step_model = DistributedDataParallel(self.model, forward_sync_buffers=False)

    def batch(self, step: int) -> Batch:
        ends = np.round(np.cumsum([0, *self.shares]) * ROWS).astype(int)
        share = slice(ends[self.rank], ends[self.rank + 1])
        return self.collator({name: column[share] for name, column in self.rows[step].items()})

    def step(self, step: int) -> float:
        """Returns the loss over all workers' rows."""
        batch = self.batch(step)
        logit_B, norm_B = self.step_model(batch)
        loss_B = torch.nn.functional.binary_cross_entropy_with_logits(logit_B, batch.label_B, reduction="none")
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        ((loss_B + 0.01 * norm_B).sum() * self.world_size / ROWS).backward()
        average_sparse_gradients(self.tables.values())
        for optimizer in self.optimizers:
            optimizer.step()
        loss = loss_B.detach().sum() / ROWS
        dist.all_reduce(loss)
        return float(loss)

    def state(self) -> dict | None:
        """What a checkpoint would hold; None but on rank 0."""
        if self.sharded:
            from llm4msr.training.sharding import gather_row_sums, gather_tables

            tables, sums = gather_tables(self.model), gather_row_sums(self.model)
        else:
            tables = {name: p.detach() for name, p in self.tables.items()}
            sums = {name: self.optimizers[1].state[p]["sum"] for name, p in self.tables.items()}
        dense = {name: value for name, value in self.model.state_dict().items() if name not in self.tables}
        if self.rank != 0:
            assert not self.sharded or (tables is None and sums is None)
            return None
        return {"tables": tables, "sums": sums, "dense": dense, "dense_optimizer": self.optimizers[0].state_dict()}

    def load(self, state: dict) -> None:
        self.optimizers[0].load_state_dict(state["dense_optimizer"])
        if self.sharded:
            from llm4msr.training.sharding import load_row_sums, load_tables

            self.model.load_state_dict(state["dense"])
            load_tables(self.model, state["tables"])
            load_row_sums(self.model, state["sums"])
        else:
            self.model.load_state_dict(state["dense"] | state["tables"])
            for name, parameter in self.tables.items():
                self.optimizers[1].state[parameter]["sum"].copy_(state["sums"][name])


def build(schema: FeatureSchema, sharded: bool) -> MultiScenarioModel:
    config = tiny_config(model={"dropout": 0.0}).model
    torch.manual_seed(3)
    model = build_model(schema, config, None)
    if sharded:
        torch.manual_seed(3)  # the embedding is built first
        model.embedding = FeatureEmbedding(schema, config.embedding_dim, materialize=False)
    return model


def train(rank: int, world_size: int, folder: str, uri: str, jobs: dict[str, dict]) -> None:
    """Runs one job after another: name -> sharded, and where it differs uneven, steps, start_from."""
    store = f"{folder}/store-{'-'.join(jobs)}"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    for name, job in jobs.items():
        training = Training(uri, job["sharded"], job.get("uneven", False))
        if "start_from" in job:
            training.load(torch.load(f"{folder}/{job['start_from']}", weights_only=True)["end"])
        begin = copy.deepcopy(training.state())
        losses = [training.step(step) for step in job.get("steps", range(STEPS))]
        end = training.state()
        training.model.eval()
        with torch.inference_mode():
            # One worker has run out of rows and joins with none; evaluation changes nothing.
            batch = training.batch(0)
            logit_B, _ = training.model(batch if rank == 0 else head(batch, 0))
        if rank == 0:
            assert torch.equal(
                flat(training.state())["embedding.tables.0.weight"], end["tables"]["embedding.tables.0.weight"]
            )
            result = {"begin": begin, "end": end, "losses": losses, "logits": logit_B.clone()}
            torch.save(result, f"{folder}/{name}")
        else:
            training.state()
            assert len(logit_B) == 0
        dist.barrier()
    dist.destroy_process_group()


def head(batch: Batch, num_rows: int) -> Batch:
    per_row = ("ids_BF", "numeric_BN", "scenario_B", "label_B", "row_id_B")
    return dataclasses.replace(
        batch,
        sequences=tuple(s[:num_rows] for s in batch.sequences),
        **{name: getattr(batch, name)[:num_rows] for name in per_row},
    )


FIRST, REST = range(3), range(3, STEPS)
# Workers, and what they train one after another.
JOBS = (
    (1, {"whole-1": {"sharded": False}, "whole-1-half": {"sharded": False, "steps": FIRST}}),
    (
        2,
        {
            "whole-2": {"sharded": False},
            "sharded-2": {"sharded": True},
            "sharded-2-uneven": {"sharded": True, "uneven": True},
            "sharded-2-half": {"sharded": True, "steps": FIRST},
            "half-to-sharded-2": {"sharded": True, "steps": REST, "start_from": "sharded-2-half"},
            "whole-to-sharded-2": {"sharded": True, "steps": REST, "start_from": "whole-1-half"},
        },
    ),
    (
        1,
        {
            "sharded-1": {"sharded": True},
            "half-to-sharded-1": {"sharded": True, "steps": REST, "start_from": "sharded-2-half"},
            "half-to-whole-1": {"sharded": False, "steps": REST, "start_from": "sharded-2-half"},
        },
    ),
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """By job: rank 0's state before and after, losses, and logits of its part of the first rows."""
    pytest.importorskip("torchrec", reason="needs the extra 'sharded'")
    folder = tmp_path_factory.mktemp("runs")
    uri = str(folder / "prepared")
    tiny_prepared(uri)
    for world_size, jobs in JOBS:
        mp.spawn(train, (world_size, str(folder), uri, jobs), nprocs=world_size)
    return {name: torch.load(folder / name, weights_only=True) for _, jobs in JOBS for name in jobs}


def flat(state: dict) -> dict[str, torch.Tensor]:
    sums = {f"sum of {name}": value for name, value in state["sums"].items()}
    return state["tables"] | sums | state["dense"]


@pytest.mark.parametrize("name", ["whole-2", "sharded-1", "sharded-2", "sharded-2-uneven"])
def test_any_layout_trains_like_one_worker_with_whole_tables(runs, name):
    one, other = runs["whole-1"], runs[name]
    for key, value in flat(one["begin"]).items():
        assert torch.equal(flat(other["begin"])[key], value), f"{key} starts otherwise"
    np.testing.assert_allclose(other["losses"], one["losses"], atol=1e-6, rtol=0)
    assert one["losses"][-1] < one["losses"][0]
    assert_close(flat(other["end"]), flat(one["end"]))
    num_rows = {"sharded-1": ROWS, "sharded-2-uneven": ROWS * 3 // 4}.get(name, ROWS // 2)
    torch.testing.assert_close(other["logits"], one["logits"][:num_rows], atol=1e-4, rtol=1e-4)


def test_layouts_differ_by_rounding_and_not_by_a_factor(runs):
    """A gradient divided once too often, or rows that are lost, would lengthen or shorten every step a little."""
    one, other = runs["whole-1"], runs["sharded-2"]
    for name, value in one["end"]["sums"].items():
        assert value[0] == 0 and value[2:].count_nonzero() > 0, f"{name}: padding is not trained, others are"
    for kind in ("tables", "sums"):
        begin, expected, found = (
            torch.cat([v.flatten() for v in state[kind].values()]).double()
            for state in (one["begin"], one["end"], other["end"])
        )
        step, shift = expected - begin, found - expected
        assert step.abs().mean() > 1e-5
        assert abs(float((shift * step).sum() / step.square().sum())) < 1e-6


def test_a_state_goes_on_with_any_layout(runs):
    half, straight = runs["sharded-2-half"], runs["sharded-2"]
    assert half["losses"] == straight["losses"][:3]
    for name in ("half-to-sharded-2", "half-to-sharded-1", "half-to-whole-1"):
        rest = runs[name]
        for key, value in flat(half["end"]).items():
            assert torch.equal(flat(rest["begin"])[key], value), key
        if name == "half-to-sharded-2":
            assert rest["losses"] == straight["losses"][3:]
            assert all(torch.equal(flat(rest["end"])[key], v) for key, v in flat(straight["end"]).items())
        np.testing.assert_allclose(rest["losses"], straight["losses"][3:], atol=1e-6, rtol=0)
        assert_close(flat(rest["end"]), flat(straight["end"]))


def test_whole_tables_go_on_sharded(runs):
    np.testing.assert_allclose(runs["whole-to-sharded-2"]["losses"], runs["whole-1"]["losses"][3:], atol=1e-6, rtol=0)


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=2e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_without_torchrec_the_message_names_the_extra(monkeypatch, tmp_path):
    from llm4msr.training.sharding import shard_embedding

    monkeypatch.setitem(sys.modules, "torchrec", None)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(ConfigError, match=r"pip install 'llm4msr\[sharded\]'"):
            shard_embedding(build(tiny_schema(), sharded=True), torch.device("cpu"), RATE)
    finally:
        dist.destroy_process_group()
