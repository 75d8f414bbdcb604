"""The parts of an extraction without Ray: planning the pool, cutting the work, one actor's work, what may fail."""

from __future__ import annotations

import pyarrow as pa
import pytest

from llm4msr import storage
from llm4msr.config import ConfigError, KnowledgeConfig
from llm4msr.knowledge.actors import EncodeUnit, Pool, cut_units, plan_pool, progress_line
from llm4msr.knowledge.encoder import EncoderError, encoder_identity
from llm4msr.knowledge.pipeline import check_failures
from llm4msr.knowledge.prompts import Prompt, prompts_table
from llm4msr.knowledge.store import KnowledgeStore, prompt_keys
from llm4msr.schema import Scenario


@pytest.mark.parametrize(
    ("settings", "num_gpus", "num_cpus", "expected"),
    [
        ({}, 0, 2, Pool(2, 0, 1)),  # the embedded encoder: an actor per core
        ({"num_actors": 1}, 0, 2, Pool(1, 0, 2)),
        ({"num_actors": 3}, 0, 16, Pool(3, 0, 5)),
        ({"model": "owner/large"}, 0, 4, Pool(1, 0, 4)),
        ({"model": "owner/large"}, 0, 16, Pool(2, 0, 8)),
        ({"model": "owner/large"}, 4, 64, Pool(4, 1, 8)),
        ({"num_actors": 2}, 4, 3, Pool(2, 1, 1)),
    ],
)
def test_plan_pool(settings, num_gpus, num_cpus, expected):
    assert plan_pool(KnowledgeConfig(**settings), num_gpus, num_cpus) == expected
    assert expected.device == ("cuda" if num_gpus else "cpu")


def test_more_actors_than_can_run_are_refused():
    with pytest.raises(ConfigError, match=r"num_actors 5: the cluster has 4 GPUs"):
        plan_pool(KnowledgeConfig(num_actors=5), 4, 64)


def test_cut_units_takes_each_missing_key_once_and_finds_its_record():
    files = [("s", 2), ("empty", 0), ("a", 3), ("b", 4)]
    keys = pa.array(["k0", "k1", "k2", "k3", "k2", "k4", "k5", "k1", "k6"])
    missing = pa.array(["k6", "k2", "k1", "k5"])
    assert cut_units(keys, missing, files, 3) == [
        [{"uri": "s", "records": [1]}, {"uri": "a", "records": [0]}, {"uri": "b", "records": [1]}],
        [{"uri": "b", "records": [3]}],
    ]
    assert cut_units(keys, missing.slice(0, 0), files, 3) == []


def test_progress_line():
    assert progress_line(50, 200, 10.0) == "encoded 50/200 prompts, 5.0 prompts/s, 0 min 30 s left"
    assert progress_line(1, 1000, 2.0) == "encoded 1/1000 prompts, 0.5 prompts/s, 33 min 18 s left"


def test_an_actor_commits_what_it_encoded_and_reports_what_it_could_not(tmp_path):
    config = KnowledgeConfig(max_tokens=32)
    identity = encoder_identity(config, "cpu")
    store = KnowledgeStore(str(tmp_path / "store"), identity)
    prompts = [Prompt("user", str(i), text, (), tail) for i, (text, tail) in enumerate(
        [("green tea", "why?"), ("steel pan", "why?"), ("", "word " * 40)])]  # fmt: skip
    keys = prompt_keys(store.identity_digest, prompts)
    uri = str(tmp_path / "prompts.parquet")
    storage.write_parquet(uri, prompts_table(prompts, [1, 2, 3], keys))
    done: list[int] = []
    actor = EncodeUnit(config, identity, str(tmp_path / "store"), "cpu", 1, done.append)
    failures = actor.run([{"uri": uri, "records": [2, 1]}])
    assert done == [1]
    assert list(failures) == [keys[2]] and "exceeds 32 tokens" in failures[keys[2]]
    assert store.keys().to_pylist() == [keys[1]]
    assert list(actor.run([{"uri": uri, "records": [2]}])) == [keys[2]]
    assert store.keys().to_pylist() == [keys[1]]
    with pytest.raises(EncoderError, match="differs between nodes"):
        EncodeUnit(config, identity | {"dtype": "bfloat16"}, str(tmp_path / "store"), "cpu", 1)


def test_a_few_failed_users_are_data_more_are_an_error(caplog):
    scenarios = (Scenario("search", ""), Scenario("feed", ""))
    keys = pa.array([f"k{i}" for i in range(200)])
    check_failures({}, keys, scenarios)
    check_failures({"k7": "broken", "k8": "broken"}, keys, scenarios)
    assert "2 of 200 prompts have no vector; the first, k7: broken" in caplog.text
    with pytest.raises(EncoderError, match=r"3 of 200 prompts.*at most 1% may fail"):
        check_failures({"k7": "broken", "k8": "broken", "k9": "broken"}, keys, scenarios)
    with pytest.raises(EncoderError, match="scenario 'feed' has no vector: broken"):
        check_failures({"k1": "broken"}, keys, scenarios)
