import asyncio
import importlib.util
import sys

import numpy as np
import pyarrow as pa
import pytest

from llm4msr.config import KnowledgeConfig
from llm4msr.knowledge.engines import vllm
from llm4msr.knowledge.engines.build import engine_identity
from llm4msr.knowledge.engines.estimates import estimate_tokens
from llm4msr.knowledge.engines.model_files import EMBEDDED_SHA256, WEIGHTS, EncoderError
from llm4msr.knowledge.prompts import KEY, PROMPT_VERSION, Prompt, prompts_table


def make_config(**values) -> KnowledgeConfig:
    return KnowledgeConfig(**{"engine": "vllm", "model": "owner/name", **values})


def make_row(events=("tea", "rice"), tail="What now?", **values):
    row = {"key": b"k" * 16, "level": "user", "subject_id": "1", "head": "User.", "sections": ["Liked"]}
    return row | {"events": list(events), "event_sections": [0] * len(events), "tail": tail} | values


def test_identity_is_what_a_vector_depends_on():
    identity = engine_identity(make_config())
    assert identity == {
        "engine": "vllm",
        "model": "owner/name",
        "revision": "main",
        "dtype": "auto",
        "pooling": "auto",
        "max_tokens": 256,
        "characters_per_token": 3.0,
        "prompt_version": PROMPT_VERSION,
    }
    for same in ({"seed": 3}, {"num_actors": 2}, {"batch_tokens": 512}, {"gpus_per_actor": 2}, {"max_new_tokens": 5}):
        assert engine_identity(make_config(**same)) == identity
    others = [{"revision": "a"}, {"dtype": "float16"}, {"pooling": "mean"}, {"max_tokens": 99}, {"preamble": "An app."}]
    others += [{"generate": True, **more} for more in ({}, {"seed": 3}, {"max_new_tokens": 5}, {"temperature": 1})]
    found = [str(engine_identity(make_config(**values))) for values in [{}, *others]]
    assert len(set(found)) == len(found)


def test_a_local_model_is_what_its_files_are():
    identity = engine_identity(make_config(model="embedded"))
    assert identity["model"] == "embedded" and identity["files"][WEIGHTS] == EMBEDDED_SHA256
    with pytest.raises(EncoderError, match="no such folder"):
        engine_identity(make_config(model="/nowhere/at/all"))


REFUSED = [
    {"layer": 3},
    {"state_from": "generated", "generate": True},
    {"gpus_per_actor": 0.5},
]


@pytest.mark.parametrize("values", REFUSED)
def test_what_vllm_cannot_do_is_refused(values):
    for refuse in (vllm.check, vllm.vllm_identity):
        with pytest.raises(EncoderError, match=f"knowledge.{next(iter(values))}"):
            refuse(make_config(**values))


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_nothing_starts():
    with pytest.raises(EncoderError, match=r"pip install llm4msr\[vllm\].*NVIDIA"):
        vllm.check(make_config())
    with pytest.raises(EncoderError, match=r"pip install llm4msr\[vllm\]"):
        vllm.encode_dataset(None, make_config())


def test_embed_request():
    request = vllm.embed_request(make_row(), make_config(preamble="An app.", max_tokens=64))
    assert request == {
        "prompt": "An app.\nUser.\nLiked: tea; rice\nWhat now?",
        "tokenization_kwargs": {"truncate_prompt_tokens": 64, "truncation_side": "left"},
        "num_dropped_events": 0,
        "num_cut_characters": 0,
        vllm.ERROR: "",
    }


def test_long_prompts_lose_their_oldest_events():
    events = np.array([f"item {i}" for i in range(200)], dtype=object)
    row = make_row(events, event_sections=np.zeros(200, dtype=np.int32))
    request = vllm.embed_request(row, make_config(max_tokens=64))
    assert 150 < request["num_dropped_events"] < 200
    assert request["prompt"].startswith("User.\nLiked: item 0; item 1;") and request["prompt"].endswith("\nWhat now?")
    assert 55 < estimate_tokens(request["prompt"], 3.0) <= 64


def test_generate_request():
    config = make_config(preamble="An app.", generate=True, temperature=0.5, max_new_tokens=7, seed=2)
    request = vllm.generate_request(make_row(), config)
    assert request["messages"] == [
        {"role": "system", "content": "An app."},
        {"role": "user", "content": "User.\nLiked: tea; rice\nWhat now?"},
    ]
    sampling = request["sampling_params"]
    assert sampling == {"temperature": 0.5, "max_tokens": 7, "seed": sampling["seed"]}
    seeds = [
        vllm.generate_request(row, make_config(generate=True, seed=seed))["sampling_params"]["seed"]
        for row, seed in ((make_row(), 2), (make_row(["tea"]), 2), (make_row(), 3))
    ]
    assert seeds[0] == sampling["seed"] and len(set(seeds)) == 3
    assert [m["role"] for m in vllm.generate_request(make_row(), make_config())["messages"]] == ["user"]


def test_prompts_that_cannot_be_sent():
    for request in (vllm.embed_request, vllm.generate_request):
        said = request(make_row(tail="word " * 100), make_config(max_tokens=16))[vllm.ERROR]
        assert said == "the instruction alone exceeds 16 tokens; raise knowledge.max_tokens"
    assert vllm.embed_request(make_row(**{vllm.ERROR: "earlier"}), make_config())[vllm.ERROR] == "earlier"


def test_engine_settings():
    configs = vllm.processor_configs(make_config(), 3)
    assert list(configs) == ["embed"]
    embed = configs["embed"]
    assert (embed.model_source, embed.task_type, embed.concurrency) == ("owner/name", "embed", 3)
    assert embed.should_continue_on_error
    assert not (embed.chat_template_stage or embed.tokenize_stage or embed.detokenize_stage)
    assert embed.engine_kwargs == {
        "task_type": "embed",
        "dtype": "auto",
        "seed": 0,
        "tensor_parallel_size": 1,
        "trust_remote_code": False,
        "max_model_len": 256,
        "pooler_config": {"use_activation": False},
    }
    values = {"revision": "abc", "pooling": "last_token", "gpus_per_actor": 2, "batch_tokens": 512, "dtype": "bfloat16"}
    configs = vllm.processor_configs(make_config(generate=True, max_new_tokens=7, **values), (1, 4))
    assert list(configs) == ["generate", "embed"]
    generate = configs["generate"]
    assert (generate.task_type, generate.concurrency) == ("generate", (1, 4))
    assert generate.chat_template_stage and generate.tokenize_stage
    assert generate.engine_kwargs == {
        "task_type": "generate",
        "dtype": "bfloat16",
        "seed": 0,
        "tensor_parallel_size": 2,
        "trust_remote_code": False,
        "max_model_len": 519,
        "revision": "abc",
        "tokenizer_revision": "abc",
        "max_num_batched_tokens": 512,
    }
    assert configs["embed"].engine_kwargs["pooler_config"] == {"use_activation": False, "pooling_type": "LAST"}


def vector_of(text: str) -> np.ndarray:
    return np.array([len(text), text.count("e"), 1], dtype=np.float32)


def build_not_vllm(config, preprocess, postprocess):
    """Builds Ray's own processor around a stage that is not vLLM: it computes what tests can foretell."""
    import ray
    from ray.llm._internal.batch.processor.base import Processor
    from ray.llm._internal.batch.stages.base import StatefulStage, StatefulStageUDF

    class NotVllm(StatefulStageUDF):
        async def udf(self, batch):
            for row in reversed(batch):
                await asyncio.sleep(0)
                index = {self.IDX_IN_BATCH_COLUMN: row[self.IDX_IN_BATCH_COLUMN]}
                text = row["prompt"] if config.task_type == "embed" else row["messages"][-1]["content"]
                failed = {"embeddings": None, "generated_text": "", "num_generated_tokens": 0, "num_input_tokens": 0}
                if f"poison {config.task_type}" in text:
                    yield index | failed | {vllm.ERROR: "ValueError: poison"}
                elif config.task_type == "embed":
                    vector = vector_of(text) * (1e9 if "huge" in text else 1)
                    yield index | failed | {"embeddings": vector, "num_input_tokens": len(text.split()), vllm.ERROR: ""}
                else:
                    answer = {"generated_text": f"About {text[:9]}", "num_generated_tokens": 3}
                    yield index | failed | answer | {vllm.ERROR: ""}

    stage = StatefulStage(fn=NotVllm, map_batches_kwargs={"compute": ray.data.ActorPoolStrategy(size=1)})
    return Processor(config, [stage], preprocess=preprocess, postprocess=postprocess)


def test_rows_flow_through_ray_without_vllm(ray_cluster):
    ray_cluster.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file
    heads = [f"Number {i}." for i in range(300)]
    heads[3], heads[5], heads[7] = "poison embed", "huge", "poison generate"
    prompts = [Prompt("user", str(i), head, ("tea",), "What?", ("Liked",), (0,)) for i, head in enumerate(heads)]
    prompts[9] = Prompt("user", "9", "", (), "word " * 1000)
    keys = [i.to_bytes(15, "big") + b"\0" for i in range(300)]
    table = prompts_table(prompts, range(300), pa.array(keys, KEY))
    rows = ray_cluster.data.from_arrow([table.slice(0, 100), table.slice(100)])
    bad = {3: "ValueError: poison", 9: "the instruction alone exceeds 256 tokens; raise knowledge.max_tokens"}
    for generate in (False, True):
        out = vllm.encode_dataset(rows, make_config(generate=generate), build=build_not_vllm)
        found = {row["key"]: row for batch in out.iter_batches(batch_format="pyarrow") for row in batch.to_pylist()}
        assert len(found) == 300 and set(found) == set(keys)
        failed = {i: found[key]["error"] for i, key in enumerate(keys) if found[key]["error"]}
        assert failed.pop(5).startswith("owner/name gave a vector with largest value")
        assert failed == (bad | {7: "ValueError: poison"} if generate else bad)
        for i, key in enumerate(keys):
            row, text = found[key], prompts[i].text()
            assert set(row) == set(vllm.ENCODED.names)
            if row["error"]:
                assert row["vector"] is None
            else:
                assert row["vector"] == vector_of(text).tolist() and row["num_tokens"] == len(text.split())
            written = generate and i not in (7, 9)
            assert row["text"] == (f"About {text[:9]}" if written else None)
            assert row["num_generated_tokens"] == (3 if written else 0)
