"""A node's copy of a checkpoint: the same scores, shared pages, made once, never in the way."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import SEQUENCES, tiny_checkpoint, tiny_knowledge, tiny_prepared

from llm4msr import storage
from llm4msr.ranker import Ranker
from llm4msr.request import RankRequest
from llm4msr.training import node_copy as module
from llm4msr.training.node_copy import node_copy

REQUEST = RankRequest(1000, "rec", [7000, 7001, 7002, 7003])


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv(module.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def uri(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("copied")
    prepared = tiny_prepared(str(folder / "prepared"), more=SEQUENCES)
    return tiny_checkpoint(str(folder / "checkpoint"), prepared, tiny_knowledge())


def scores(ranker: Ranker) -> list[float]:
    return [r.score for r in ranker.rank(REQUEST).results]


def copies(root: Path) -> list[Path]:
    return [path for path in root.iterdir() if path.is_dir()]


def test_the_scores_are_the_same(root, uri):
    shared = Ranker.from_checkpoint(uri, shared=True)

    assert scores(shared) == scores(Ranker.from_checkpoint(uri))
    assert shared.checkpoint.uri == uri


def own_kib(root: Path) -> dict[str, int]:
    """The mapped files of the copies, and what of each is this process's alone."""
    own, name = {}, None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \d+ *(.*)$", line):
            name = found[1]
        elif line.startswith("Anonymous:") and name and str(root) in name:
            own[Path(name).name] = own.get(Path(name).name, 0) + int(line.split()[1])
    return own


@pytest.mark.parametrize("knowledge", [True, False])
def test_what_is_large_is_mapped_and_not_copied(root, tmp_path, knowledge):
    prepared = tiny_prepared(str(tmp_path / "prepared"), more=SEQUENCES)
    checkpoint = tiny_checkpoint(str(tmp_path / "checkpoint"), prepared, tiny_knowledge() if knowledge else None)
    ranker = Ranker.from_checkpoint(checkpoint, shared=True)
    scores(ranker)

    own = own_kib(root)
    assert own.keys() >= {"model.safetensors", "user.arrow", "item.arrow", "user.ids.npy", "item.ids.npy"}
    assert ("users.npy" in own) == knowledge
    assert set(own.values()) == {0}
    assert isinstance(ranker.checkpoint.collator.users.ids, np.memmap)


def test_text_ids_are_mapped_too(root, tmp_path):
    prepared = tiny_prepared(str(tmp_path / "prepared"), user_key_type="string")
    checkpoint = tiny_checkpoint(str(tmp_path / "checkpoint"), prepared, tiny_knowledge())
    gc.collect()
    before = pa.total_allocated_bytes()
    shared = Ranker.from_checkpoint(checkpoint, shared=True)
    keys = shared.checkpoint.users["key"].to_pylist()

    assert shared.user_rows([*keys, "nobody"], "user").tolist() == [*range(1, len(keys) + 1), 0]
    assert pa.total_allocated_bytes() <= before
    own = own_kib(root)
    assert {name: own[name] for name in ("user.arrow", "user.hashes.npy", "user.places.npy")} == {
        "user.arrow": 0,
        "user.hashes.npy": 0,
        "user.places.npy": 0,
    }
    assert "item.hashes.npy" not in own  # whole numbers are in their own order
    request = replace(REQUEST, user=keys[3])
    alone = Ranker.from_checkpoint(checkpoint)
    assert shared.rank(request).results == alone.rank(request).results
    assert shared.rank(request).user_known


def test_text_of_more_pieces_becomes_one(root, tmp_path):
    prepared = tiny_prepared(str(tmp_path / "prepared"), user_key_type="string")
    checkpoint = tiny_checkpoint(str(tmp_path / "checkpoint"), prepared, tiny_knowledge())
    users = pq.read_table(f"{checkpoint}/users.parquet")
    pq.write_table(users, f"{checkpoint}/users.parquet", row_group_size=7)
    shared = Ranker.from_checkpoint(checkpoint, shared=True)

    assert shared.checkpoint.users["key"].num_chunks == 1
    assert shared.checkpoint.users["text"].type == pa.large_string()
    for name in users.column_names:
        assert shared.checkpoint.users[name].to_pylist() == users[name].to_pylist()


def test_a_copy_of_an_older_layout_is_not_read(root, uri, monkeypatch):
    place = node_copy(uri)
    monkeypatch.setattr(module, "VERSION", module.VERSION - 1)

    assert node_copy(uri) != place


def test_it_is_made_once_by_whoever_is_first(root, uri):
    program = "import sys; from llm4msr.training.node_copy import node_copy; print(node_copy(sys.argv[1]))"
    processes = [
        subprocess.Popen([sys.executable, "-c", program, uri], stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    places = {process.communicate()[0].strip() for process in processes}

    assert [process.returncode for process in processes] == [0, 0, 0]
    (place,) = copies(root)
    assert places == {str(place)}
    made = (place / "user.arrow").stat().st_ino
    assert node_copy(uri) == place
    assert (place / "user.arrow").stat().st_ino == made


def test_another_content_is_another_copy(root, tmp_path):
    prepared = tiny_prepared(str(tmp_path / "prepared"))
    checkpoint = str(tmp_path / "checkpoint")
    found = []
    for seed in (0, 1):
        tiny_checkpoint(checkpoint, prepared, tiny_knowledge(), seed=seed)
        found.append(scores(Ranker.from_checkpoint(checkpoint, shared=True)))
        assert found[-1] == scores(Ranker.from_checkpoint(checkpoint))
    assert found[0] != found[1] and len(copies(root)) == 2


def test_unused_copies_go(root, uri, tmp_path):
    old = node_copy(uri)
    long_ago = time.time() - module.KEPT_S - 60
    os.utime(old, (long_ago, long_ago))
    prepared = tiny_prepared(str(tmp_path / "prepared"))
    fresh = node_copy(tiny_checkpoint(str(tmp_path / "checkpoint"), prepared, tiny_knowledge()))

    assert copies(root) == [fresh]
    assert node_copy(uri) == old  # made again


def test_what_a_process_that_died_left_is_made_again(root, uri):
    place = node_copy(uri)
    unfinished = place.with_name(f".{place.name}")
    place.rename(unfinished)
    (unfinished / "model.safetensors").write_bytes(b"half")

    assert scores(Ranker.from_checkpoint(uri, shared=True)) == scores(Ranker.from_checkpoint(uri))


def test_a_damaged_checkpoint_is_named_not_its_copy(root, tmp_path):
    prepared = tiny_prepared(str(tmp_path / "prepared"))
    checkpoint = tiny_checkpoint(str(tmp_path / "checkpoint"), prepared, tiny_knowledge())
    (Path(checkpoint) / "model.safetensors").write_bytes(b"{}")

    with pytest.raises(storage.StorageError, match=re.escape(f"{checkpoint}/model.safetensors: not readable")):
        Ranker.from_checkpoint(checkpoint, shared=True)
    with pytest.raises(storage.StorageError, match="nothing does not exist"):
        Ranker.from_checkpoint(str(tmp_path / "nothing"), shared=True)


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, uri):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(module.CACHE_VARIABLE, str(tmp_path / "file" / "below"))

    with pytest.raises(storage.StorageError, match="name another with LLM4MSR_CACHE"):
        node_copy(uri)
