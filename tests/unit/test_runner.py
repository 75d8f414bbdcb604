"""Passes that fail: rows stand alone, batches shrink when memory runs out, for real where that is possible."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_lm import WORDS, encoder, make_model

from llm4msr.knowledge.engines.interface import BatchDone
from llm4msr.knowledge.engines.runner import Passed, Runner, is_out_of_memory
from llm4msr.knowledge.prompts import Liked, user_prompt

CPU = torch.device("cpu")


def run(lengths, batch_tokens, forward, rows=None):
    """Returns the runner, the value that each row got, and the reasons of those that got none."""
    runner, values, reasons = Runner(batch_tokens, CPU), {}, {}

    def on_done(rows_B, vectors_BK, passed, busy_s):
        for row, vector in zip(rows_B.tolist(), vectors_BK, strict=True):
            assert row not in values
            values[row] = float(vector[0])

    lengths = np.array(lengths, dtype=int)
    rows = np.arange(len(lengths)) if rows is None else np.array(rows)
    runner.run(lengths, rows, forward, on_done, lambda row, reason, busy_s: reasons.setdefault(row, reason))
    return runner, values, reasons


def echo(rows_B: np.ndarray) -> Passed:
    return Passed(torch.from_numpy(rows_B).float()[:, None], 0)


@given(st.lists(st.integers(1, 50), max_size=40), st.sets(st.integers(0, 39)), st.integers(1, 500))
def test_only_the_rows_at_fault_fail(lengths, bad, batch_tokens):
    def forward(rows_B):
        if at_fault := sorted(bad & set(rows_B.tolist())):
            raise ValueError(f"row {at_fault[0]}")
        return echo(rows_B)

    runner, values, reasons = run(lengths, batch_tokens, forward)
    bad = bad & set(range(len(lengths)))
    assert reasons == {row: f"ValueError: row {row}" for row in bad}
    assert values == {row: row for row in range(len(lengths)) if row not in bad}
    assert runner.batch_tokens == batch_tokens


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=15), st.integers(1, 500), st.integers(1, 500))
def test_memory_that_runs_out_halves_the_batch(lengths, batch_tokens, room):
    lengths = np.array(lengths)
    tried = []

    def forward(rows_B):
        tried.append(len(rows_B) * int(lengths[rows_B].max()))
        if tried[-1] > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return echo(rows_B)

    runner, values, reasons = run(lengths, batch_tokens, forward)
    assert values == {row: row for row in range(len(lengths)) if lengths[row] <= room}
    assert reasons == {
        row: f"a prompt of {lengths[row]} tokens alone does not fit into memory"
        for row in range(len(lengths))
        if lengths[row] > room
    }
    # Every failure of several rows halves: the budget passes from batch_tokens to the room in that many steps.
    assert runner.batch_tokens == batch_tokens or runner.batch_tokens > min(room, batch_tokens) // 2 - 1
    assert sum(t > room for t in tried) <= len(reasons) + np.log2(batch_tokens) + 1


def test_the_smaller_batch_stays_and_is_said_once(caplog):
    def forward(rows_B):
        if len(rows_B) * 10 > 60:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes.")
        return echo(rows_B)

    runner, values, _ = run([10] * 20, 100, forward, rows=range(3, 20))
    assert runner.batch_tokens == 50 and sorted(values) == list(range(3, 20))
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "over 100 tokens ran out of memory; going on with knowledge.batch_tokens = 50" in record.getMessage()


def test_what_counts_as_out_of_memory():
    assert is_out_of_memory(torch.OutOfMemoryError("x")) and is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(ValueError("not enough memory"))


def test_a_lost_gpu_ends_the_run():
    def forward(rows_B):
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    with pytest.raises(torch.AcceleratorError):
        run([1, 2], 10, forward)


def test_a_real_model_that_raises_for_one_prompt(tmp_path, caplog):
    path = make_model(tmp_path / "m", spread=0.2)
    items = [user_prompt("u", "", [Liked("a", 1, 0, ("tea", word))]) for word in ("tea", "pan", "old", "new", "red")]
    expected = encoder(path).encode(items).vectors
    e = encoder(path)
    pan = 5 + WORDS.index("pan")

    def refuse(model, arguments, named):
        if (named["input_ids"] == pan).any():
            raise RuntimeError("cannot read this")

    e._reader.base.register_forward_pre_hook(refuse, with_kwargs=True)
    done: list[BatchDone] = []
    batch = e.encode(items, done.append)
    assert batch.errors == (None, "RuntimeError: cannot read this", None, None, None)
    assert "over 5 prompts raised RuntimeError: cannot read this; trying them in halves" in caplog.text
    np.testing.assert_allclose(np.delete(batch.vectors, 1, 0), np.delete(expected, 1, 0), atol=1e-4)
    assert not batch.vectors[1].any() and batch.num_tokens[1] == 0 and batch.num_tokens[0] > 0
    total = sum(done, BatchDone())
    assert (total.num_prompts, total.num_failed, total.num_tokens) == (5, 1, batch.num_tokens.sum())
    assert total.busy_s > 0


UNDER_A_LIMIT = """
import logging, resource, sys
import numpy as np
from tiny_lm import encoder
from llm4msr.knowledge.prompts import Prompt

logging.basicConfig(level="WARNING", format="%(message)s")
items = [Prompt("user", str(i), "", (), " ".join(["tea", "pan", "old"][i % 3 :] + ["red"] * 250)) for i in range(64)]
items.append(Prompt("user", "long", "", (), "red " * 8000))
# Eager attention keeps a table of T x T for every row and head: 16 MB for 64 rows of 252 tokens, 1 GB for 8,000.
settings = {"attention": "eager", "max_tokens": 8192, "batch_tokens": 64 * 300}
expected = encoder(sys.argv[1], **settings | {"batch_tokens": 300}).encode(items[:64]).vectors
e = encoder(sys.argv[1], **settings)
e.encode(items[:1])
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 60 * 2**20, resource.RLIM_INFINITY))
batch = e.encode(items)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
np.testing.assert_allclose(batch.vectors[:64], expected, atol=1e-4)
assert batch.errors[:64] == (None,) * 64, batch.errors
assert not batch.vectors[64].any()
print(e._runner.batch_tokens, batch.errors[64])
"""


def test_a_process_that_really_runs_out_of_memory(tmp_path):
    path = make_model(tmp_path / "m", positions=8192, spread=0.2)
    here = Path(__file__).resolve().parent
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), str(here.parent.parent)]), "MALLOC_ARENA_MAX": "1"}
    out = subprocess.run(
        [sys.executable, "-c", UNDER_A_LIMIT, path], env=env, capture_output=True, text=True, check=False
    )
    assert out.returncode == 0, out.stderr
    batch_tokens, reason = out.stdout.strip().split(" ", 1)
    assert 64 <= int(batch_tokens) < 64 * 300 // 2 + 1
    assert reason == "a prompt of 8000 tokens alone does not fit into memory"
    assert "ran out of memory; going on with" in out.stderr
