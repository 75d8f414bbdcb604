"""Checkpoints: what is saved is what is loaded, and what cannot be loaded is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_checkpoint, tiny_config, tiny_knowledge, tiny_prepared

from llm4msr import storage
from llm4msr.knowledge.table import FILES
from llm4msr.ranker import Ranker
from llm4msr.request import RankRequest
from llm4msr.training.checkpoint import load_checkpoint
from llm4msr.training.saving import save_checkpoint
from llm4msr.training.tensors import write_tensors

REQUEST = RankRequest(user=1003, scenario="search", items=[7000, 7004, 2**53 + 1, 5], context={"search_source": "box"})


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return tiny_prepared(str(tmp_path_factory.mktemp("prepared")))


@pytest.fixture
def checkpoint(prepared, tmp_path) -> Path:
    return Path(tiny_checkpoint(str(tmp_path / "checkpoint"), prepared, tiny_knowledge()))


def change_json(path: Path, change) -> None:
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


class TestRoundTrip:
    def test_everything_comes_back(self, prepared, checkpoint):
        loaded = load_checkpoint(str(checkpoint))

        assert loaded.schema == prepared.schema
        assert loaded.config.model_dump() == tiny_config().model_dump()
        assert loaded.users.equals(prepared.users())
        assert loaded.items.equals(prepared.items())
        assert loaded.vocabulary("search_source").to_pylist() == ["box", "suggestion"]
        assert loaded.metadata["model_version"] == "tiny-0"
        assert not loaded.model.training
        for name in FILES:
            np.testing.assert_array_equal(getattr(loaded.knowledge, name), getattr(tiny_knowledge(), name))
        assert loaded.model.item_knowledge is None

    def test_item_knowledge_comes_back(self, prepared, tmp_path):
        """What is served needs nothing beside the checkpoint: vectors, index, projection and its statistics."""
        table = tiny_knowledge(items=True)

        loaded = load_checkpoint(tiny_checkpoint(str(tmp_path / "c"), prepared, table))

        for name in FILES:
            np.testing.assert_array_equal(getattr(loaded.knowledge, name), getattr(table, name))
        trunk = loaded.model.item_knowledge.trunk
        mean_K, std_K = table.item_statistics()
        np.testing.assert_array_equal(trunk.mean_K, mean_K)
        np.testing.assert_array_equal(trunk.std_K, std_K)
        assert trunk.dense[0].weight.shape == (64, 8) and trunk.missing_Z.shape == (16,)
        before = Ranker(loaded).rank(REQUEST)
        moved = Path(loaded.uri).rename(tmp_path / "elsewhere")
        assert Ranker.from_checkpoint(str(moved)).rank(REQUEST).results == before.results

    def test_weights_come_back_bit_by_bit(self, prepared, checkpoint, tmp_path):
        first = load_checkpoint(str(checkpoint))
        again = str(tmp_path / "again")

        write_tensors(str(tmp_path / "weights"), first.model.state_dict())
        save_checkpoint(again, first.config, prepared, first.knowledge, str(tmp_path / "weights"), first.metadata)

        one, other = first.model.state_dict(), load_checkpoint(again).model.state_dict()
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)

    def test_without_knowledge(self, prepared, tmp_path):
        loaded = load_checkpoint(tiny_checkpoint(str(tmp_path / "c"), prepared, None))

        assert loaded.knowledge is None
        assert loaded.model.user_meta is None
        assert not (tmp_path / "c" / "knowledge").exists()

    def test_what_an_unfinished_attempt_left_is_removed(self, prepared, tmp_path):
        (tmp_path / "c").mkdir()
        (tmp_path / "c" / "left.over").write_text("x")

        tiny_checkpoint(str(tmp_path / "c"), prepared, None)

        assert not (tmp_path / "c" / "left.over").exists()

    def test_it_is_enough_alone_and_can_be_moved(self, checkpoint, tmp_path):
        """Nothing inside points to where it was written."""
        before = Ranker.from_checkpoint(str(checkpoint)).rank(REQUEST)
        moved = checkpoint.rename(tmp_path / "elsewhere")

        assert Ranker.from_checkpoint(str(moved)).rank(REQUEST).results == before.results

    def test_on_s3(self, prepared, checkpoint, bucket):
        uri = tiny_checkpoint(f"s3://{bucket}/runs/x/checkpoint", prepared, tiny_knowledge())

        local, remote = Ranker.from_checkpoint(str(checkpoint)), Ranker.from_checkpoint(uri)
        assert remote.rank(REQUEST).results == local.rank(REQUEST).results
        with pytest.raises(storage.StorageError, match=f"s3://{bucket}/runs/y/checkpoint does not exist"):
            load_checkpoint(f"s3://{bucket}/runs/y/checkpoint")
        storage.remove(f"{uri}/model.safetensors")
        with pytest.raises(storage.StorageError, match=r"x/checkpoint/model.safetensors: no such file"):
            load_checkpoint(uri)


class TestRefusals:
    def test_nothing_there(self, tmp_path):
        with pytest.raises(storage.StorageError, match=r"nowhere does not exist: .* written by jobs.train"):
            load_checkpoint(str(tmp_path / "nowhere"))

    def test_unfinished(self, checkpoint):
        (checkpoint / "manifest.json").unlink()

        with pytest.raises(storage.StorageError, match=r"checkpoint is unfinished \(no manifest.json\)"):
            load_checkpoint(str(checkpoint))

    def test_a_directory_of_another_kind(self, prepared):
        with pytest.raises(storage.StorageError, match="a 'prepared' directory, not a checkpoint"):
            load_checkpoint(prepared.uri)

    @pytest.mark.parametrize("damage", [lambda data: data[:-100], lambda data: b"\xff" * 8 + data[8:], lambda _: b""])
    def test_damaged_weights(self, checkpoint, damage):
        path = checkpoint / "model.safetensors"
        path.write_bytes(damage(path.read_bytes()))

        with pytest.raises(storage.StorageError, match=r"model.safetensors: not readable safetensors"):
            load_checkpoint(str(checkpoint))

    def test_missing_weights(self, checkpoint):
        (checkpoint / "model.safetensors").unlink()

        with pytest.raises(storage.StorageError, match=r"model.safetensors: no such file"):
            load_checkpoint(str(checkpoint))

    def test_weights_of_another_shape(self, checkpoint):
        change_json(checkpoint / "config.json", lambda tree: tree["model"].update(embedding_dim=8))

        with pytest.raises(storage.StorageError, match=r"weights do not fit config.json[\s\S]*embedding"):
            load_checkpoint(str(checkpoint))

    def test_a_missing_and_a_strange_weight_are_named(self, checkpoint):
        path = checkpoint / "model.safetensors"
        state = load_file(path)
        name = next(iter(state))
        save_file({"strange": state.pop(name), **state}, path)

        with pytest.raises(storage.StorageError) as error:
            load_checkpoint(str(checkpoint))
        assert name in str(error.value)
        assert "strange" in str(error.value)

    @pytest.mark.parametrize("name", ["users.npy", "items.npy"])
    def test_knowledge_that_is_gone(self, checkpoint, name):
        (checkpoint / "knowledge" / name).unlink()

        with pytest.raises(storage.StorageError, match=rf"knowledge/{name}: no such file; .* train again"):
            load_checkpoint(str(checkpoint))

    def test_knowledge_of_other_data(self, checkpoint):
        index_N = np.load(checkpoint / "knowledge" / "item_index.npy")
        np.save(checkpoint / "knowledge" / "item_index.npy", index_N[:-1])

        with pytest.raises(ValueError, match="the knowledge table is of 29 items, the data has 30"):
            load_checkpoint(str(checkpoint))

    def test_item_knowledge_without_its_weights(self, prepared, checkpoint):
        tiny_knowledge(items=True).save(str(checkpoint / "knowledge"))

        with pytest.raises(storage.StorageError, match=r"weights do not fit config.json[\s\S]*item_knowledge"):
            load_checkpoint(str(checkpoint))
