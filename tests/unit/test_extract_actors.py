"""The parts of an extraction without Ray: planning the pool, one actor's work, what may fail."""

from __future__ import annotations

import subprocess
import sys

import pyarrow as pa
import pytest

from llm4msr import storage
from llm4msr.config import ConfigError, KnowledgeConfig
from llm4msr.knowledge.actors import MAX_ATTEMPTS, EncodeUnit, Pool, plan_pool, waited_for
from llm4msr.knowledge.engines.encoder import EncoderError, encoder_identity
from llm4msr.knowledge.engines.interface import BatchDone, Hardware
from llm4msr.knowledge.pipeline import check_errors
from llm4msr.knowledge.prompts import Prompt, prompts_table
from llm4msr.knowledge.store import KnowledgeStore, keys_to_arrow, prompt_keys
from llm4msr.placement import Node, alive_nodes

LARGE = {"model": "owner/large"}


@pytest.mark.parametrize(
    ("settings", "nodes", "expected"),
    [
        ({}, [(2, 0)], Pool(2, 2, 0, 1)),  # the embedded encoder: an actor per core
        ({}, [(16, 0)], Pool(16, 16, 0, 1)),
        ({"num_actors": 1}, [(2, 0)], Pool(1, 1, 0, 2)),
        ({"num_actors": 3}, [(16, 0)], Pool(3, 3, 0, 5)),
        ({"num_actors": 3}, [(4, 0), (4, 0)], Pool(3, 3, 0, 2)),  # an actor lies on one node
        ({"num_actors": (1, 4)}, [(2, 0)], Pool(1, 4, 0, 2)),  # a cluster that grows
        ({"cpus_per_actor": 2}, [(8, 0)], Pool(4, 4, 0, 2)),
        (LARGE, [(4, 0)], Pool(1, 1, 0, 4)),
        (LARGE, [(4, 0), (4, 0)], Pool(2, 2, 0, 4)),
        (LARGE, [(16, 0)], Pool(2, 2, 0, 8)),
        (LARGE, [(64, 4)], Pool(4, 4, 1, 8)),
        (LARGE, [(16, 1), (16, 1), (16, 0), (16, 2)], Pool(4, 4, 1, 8)),
        (LARGE, [(64, 0), (4, 1)], Pool(1, 1, 1, 4)),  # another node's CPUs are of no use beside a GPU
        (LARGE, [(3, 4)], Pool(3, 3, 1, 1)),
        (LARGE | {"device": "cpu"}, [(16, 4)], Pool(2, 2, 0, 8)),
        (LARGE | {"num_actors": 2}, [(3, 4)], Pool(2, 2, 1, 1)),
        (LARGE | {"gpus_per_actor": 0.5}, [(16, 2)], Pool(4, 4, 0.5, 4)),
        (LARGE | {"gpus_per_actor": 0.4}, [(16, 8)], Pool(16, 16, 0.4, 1)),  # two on each, not 20 in all
        (LARGE | {"gpus_per_actor": 2, "engine": "vllm"}, [(16, 4)], Pool(2, 2, 2, 8)),
        (LARGE | {"gpus_per_actor": 2, "engine": "vllm"}, [(8, 3), (8, 1), (8, 1)], Pool(1, 1, 2, 8)),
        (LARGE | {"num_actors": (1, 8)}, [(32, 8)], Pool(1, 8, 1, 4)),  # CPUs for all that fit, not for the fewest
        (LARGE | {"engine": "openai"}, [(16, 4)], Pool(1, 1, 0, 1)),
        (LARGE | {"engine": "openai", "num_actors": 3}, [(16, 0)], Pool(3, 3, 0, 1)),
        # A head without CPUs, its workers yet to be started.
        ({}, [(0, 0)], Pool(1, 1, 0, 1)),
        ({}, [], Pool(1, 1, 0, 1)),
        (LARGE, [(0, 0)], Pool(1, 1, 0, 1)),
        (LARGE | {"num_actors": (2, 8)}, [(0, 0)], Pool(2, 8, 0, 1)),
        (LARGE | {"engine": "openai"}, [(0, 0)], Pool(1, 1, 0, 1)),
        # GPUs that are yet to be started: one CPU is beside each, more may not be.
        (LARGE | {"device": "cuda", "num_actors": (1, 8)}, [(16, 0)], Pool(1, 8, 1, 1)),
        (LARGE | {"device": "cuda", "num_actors": (1, 8), "cpus_per_actor": 4}, [(16, 0)], Pool(1, 8, 1, 4)),
    ],
)
def test_plan_pool(settings, nodes, expected):
    pool = plan_pool(KnowledgeConfig(**settings), [Node(*node) for node in nodes])
    assert pool == expected
    assert pool.device == ("cuda" if expected.num_gpus else "cpu")


@pytest.mark.parametrize(
    ("pool", "nodes", "expected"),
    [
        (Pool(2, 2, 0, 1), [(2, 0)], None),
        (Pool(1, 8, 1, 4), [(4, 1)], None),  # the fewest can run, and the others may come
        (Pool(1, 8, 1, 1), [(16, 0)], "nodes for 1 of 1 actors, 1 CPUs and 1 GPUs each"),
        (Pool(3, 3, 0.5, 4), [(8, 1), (1, 4)], "nodes for 1 of 3 actors, 4 CPUs and 0.5 GPUs each"),
        (Pool(1, 1, 0, 1), [], "nodes for 1 of 1 actors, 1 CPUs each"),
    ],
)
def test_what_is_waited_for(pool, nodes, expected):
    assert waited_for(pool, [Node(*node) for node in nodes]) == expected


def test_nodes_that_are_there():
    found = [
        {"Alive": True, "Resources": {"CPU": 8.0, "memory": 1.0, "node:__internal_head__": 1.0}},
        {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}},
        {"Alive": True, "Resources": {"GPU": 2.0, "CPU": 4.0}},
        {"Alive": True, "Resources": {}},
    ]
    assert alive_nodes(found) == (Node(8, 0), Node(4, 2), Node(0, 0))


@pytest.mark.parametrize(
    ("settings", "num_gpus", "message"),
    [
        ({"num_actors": 5}, 4, r"num_actors 5: the cluster has 4 GPUs and 64 CPUs, enough for 4 with 1 CPUs each"),
        (
            {"num_actors": 5, "gpus_per_actor": 2, "engine": "vllm"},
            4,
            r"num_actors 5: the cluster has 4 GPUs and 64 CPUs, enough for 2",
        ),
        ({"num_actors": 4, "cpus_per_actor": 32}, 4, r"num_actors 4: .* enough for 2 with 32 CPUs each"),
        ({"engine": "vllm"}, 0, r"gpus_per_actor 1: the cluster has 0 GPUs now"),
        ({"num_actors": 65}, 0, r"num_actors 65: the cluster has 64 CPUs"),
        ({"device": "cuda"}, 0, r"gpus_per_actor 1: the cluster has 0 GPUs now.*\[1, 8\]"),
        ({"gpus_per_actor": 8, "engine": "vllm"}, 4, r"gpus_per_actor 8: the cluster has 4 GPUs now"),
    ],
)
def test_actors_that_can_never_run_are_refused(settings, num_gpus, message):
    with pytest.raises(ConfigError, match=message):
        plan_pool(KnowledgeConfig(**settings), [Node(64, num_gpus)])


CONFIG = KnowledgeConfig(max_tokens=32, dtype="float32")


@pytest.fixture
def work(tmp_path):
    """A store, the file of three prompts of which the last is too long, their keys, and what an actor is made with."""
    identity = encoder_identity(CONFIG, "cpu")
    root = str(tmp_path / "store")
    store = KnowledgeStore(root, identity)
    texts = [("green tea", "why?"), ("steel pan", "why?"), ("", "word " * 40)]
    prompts = [Prompt("user", str(i), text, (), tail) for i, (text, tail) in enumerate(texts)]
    keys = prompt_keys(store.identity_digest, prompts)
    uri = str(tmp_path / "prompts.parquet")
    storage.write_parquet(uri, prompts_table(prompts, [1, 2, 3], keys_to_arrow(keys)))
    return store, uri, keys, (CONFIG, identity, root, ("elsewhere", uri), "cpu", 1)


def test_an_actor_commits_what_it_encoded_and_what_it_could_not(work):
    store, _, keys, arguments = work
    ready: list[Hardware] = []
    done: list[BatchDone] = []
    actor = EncodeUnit(*arguments, 1, None, ready.append, done.append)
    unit = [{"file": 1, "records": [2, 1]}]
    assert actor(pa.table({"unit": [unit]})).to_pylist() == [{"num_failed": 1, "num_failed_scenarios": 0}]
    assert [hardware.device for hardware in ready] == ["cpu"]
    total = sum(done, BatchDone())
    assert (total.num_prompts, total.num_failed) == (2, 1) and total.num_tokens > 0
    index = store.index()
    assert index.keys_N.tolist() == [keys[1]]
    assert "exceed" in index.error_of(keys)[2] and "32 tokens" in index.error_of(keys)[2]
    assert actor.run([{"file": 1, "records": [2]}])["num_failed"] == 1  # it is tried again, and fails again
    assert len(store.index().keys_N) == 1


def test_what_an_actor_committed_before_it_died_is_not_done_again(work):
    store, _, _, arguments = work
    unit = [{"file": 1, "records": [0, 1]}]
    assert EncodeUnit(*arguments).run(unit)["num_failed"] == 0
    before = store.index()
    done: list[BatchDone] = []
    assert EncodeUnit(*arguments, 1, None, None, done.append).run(unit)["num_failed"] == 0
    assert not done and store.index().parts == before.parts


def test_an_actor_whose_model_is_not_the_drivers_says_so(work):
    config, identity, *rest = work[3]
    with pytest.raises(EncoderError, match="differs between nodes"):
        EncodeUnit(config, identity | {"dtype": "bfloat16"}, *rest).run([{"file": 1, "records": [0]}])


def test_a_unit_that_ends_its_process_again_and_again_is_given_up(work):
    store, _, keys, arguments = work
    unit = [{"file": 1, "records": [0, 1]}]
    names: list[str] = []
    actor = EncodeUnit(*arguments, 1, lambda name: names.append(name) or MAX_ATTEMPTS + 1)
    assert actor.run(unit) == {"num_failed": 2, "num_failed_scenarios": 0}
    assert names == [store.part_uri(keys[:2])]
    index = store.index()
    assert not len(index.keys_N)
    assert index.error_of(keys)[:2] == [f"its unit ended {MAX_ATTEMPTS} processes; see the logs of the actors"] * 2
    # A later job tries them again.
    assert EncodeUnit(*arguments, 1, lambda name: 1).run(unit)["num_failed"] == 0
    assert len(store.index().keys_N) == 2


def test_an_actor_that_lost_its_device_ends_its_process(tmp_path):
    script = tmp_path / "lost.py"
    script.write_text(
        "import sys\n"
        "from llm4msr import storage\n"
        "from llm4msr.config import KnowledgeConfig\n"
        "from llm4msr.knowledge import actors\n"
        "from llm4msr.knowledge.engines.interface import DeviceLostError\n"
        "from llm4msr.knowledge.prompts import Prompt, prompts_table\n"
        "from llm4msr.knowledge.store import keys_to_arrow, prompt_keys\n"
        "prompts = [Prompt('user', '1', 'tea', (), 'why?')]\n"
        "uri = sys.argv[1] + '/p.parquet'\n"
        "storage.write_parquet(uri, prompts_table(prompts, [1], keys_to_arrow(prompt_keys('id', prompts))))\n"
        "class Lost:\n"
        "    def encode(self, prompts, on_batch):\n"
        "        raise DeviceLostError('GPU 0: an illegal memory access was encountered')\n"
        "unit = actors.EncodeUnit(KnowledgeConfig(), {}, sys.argv[1] + '/store', (uri,), 'cpu', 1)\n"
        "unit._engine = Lost()\n"
        "unit.run([{'file': 0, 'records': [0]}])\n"
        "print('still here')\n"
    )
    done = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "still here" not in done.stdout
    assert "illegal memory access" in done.stderr and "Ray starts another" in done.stderr
    assert not list(tmp_path.glob("store/*/part-*"))


def errors_of(*levels: str) -> pa.Table:
    n = len(levels)
    columns = {
        "level": list(levels),
        "subject_id": [f"s{i}" for i in range(n)],
        "error": [f"broken {i}" for i in range(n)],
    }
    return pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})


def test_a_few_failed_users_are_data_more_are_an_error(caplog):
    check_errors(errors_of(), 200, 0.01)
    assert not caplog.text
    check_errors(errors_of("user", "item"), 200, 0.01)
    assert "2 of 200 prompts have no vector; the first: user s0: broken 0; item s1: broken 1" in caplog.text
    with pytest.raises(EncoderError, match=r"3 of 200 prompts.*max_error_fraction allows 0\.01"):
        check_errors(errors_of("user", "user", "user"), 200, 0.01)
    with pytest.raises(EncoderError, match=r"1 of 200 prompts"):
        check_errors(errors_of("user"), 200, 0)
    with pytest.raises(EncoderError, match="the prompt of scenario 's0' has no vector: broken 0"):
        check_errors(errors_of("scenario"), 200, 0.5)
