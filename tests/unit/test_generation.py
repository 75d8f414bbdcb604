"""Answers in words, by real tiny models with random weights: whose they are, when they end, which state is read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tiny_lm import NOUNS, WORDS, encoder, make_model, prompts

from llm4msr.knowledge.engines.batching import plan_batches
from llm4msr.knowledge.engines.encoder import EncoderError
from llm4msr.knowledge.engines.interface import BatchDone
from llm4msr.knowledge.prompts import Prompt

PREAMBLE = " ".join(NOUNS * 2)
SETTINGS = {"generate": True, "max_new_tokens": 12, "batch_tokens": 200}
KINDS = ("llama", "mistral", "gpt2")


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: make_model(folder / kind, kind, positions=200, spread=0.3) for kind in KINDS}


def theirs(path: str, text: str) -> list[int]:
    """The library's own greedy answer, without the token that ends it."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    ids = tokenizer(text, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids["input_ids"].shape[1] :]
    return [i for i in out.tolist() if i != tokenizer.eos_token_id]


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_answers_are_the_librarys(paths, kind):
    batch = encoder(paths[kind], **SETTINGS).encode(prompts())
    tokenizer = transformers.AutoTokenizer.from_pretrained(paths[kind])
    for i, prompt in enumerate(prompts()):
        ids = theirs(paths[kind], prompt.text())
        assert batch.texts[i] == tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert batch.num_generated_tokens[i] == len(ids)
    assert len(set(batch.texts)) > 1


@pytest.mark.shared
def test_a_real_models_answer(shared):
    path = str(shared / "models" / "stories260k")
    items = [Prompt("user", "u", "", (), text) for text in ("Once upon a time", "Lily saw a big dog.", "One day")]
    batch = encoder(path, **SETTINGS).encode(items)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    assert list(batch.texts) == [tokenizer.decode(theirs(path, p.text())).strip() for p in items]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("pooling", ["last_token", "mean"])
@pytest.mark.parametrize("preamble", ["", PREAMBLE])
@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_does_not_depend_on_neighbours(paths, kind, preamble, pooling, temperature):
    settings = SETTINGS | {"temperature": temperature, "state_from": "generated", "pooling": pooling}
    e = encoder(paths[kind], preamble=preamble, **settings)
    done: list[BatchDone] = []
    batch = e.encode(prompts(12), done.append)
    total = sum(done, BatchDone())
    # No pass failed and was tried again in halves.
    assert sum(d.num_prompts > 0 for d in done) == len(plan_batches(batch.num_tokens + 12, 200)) < 12
    assert total.num_generated_tokens == batch.num_generated_tokens.sum() and total.num_prompts == 12
    # A window would count the padding between prefix and prompt, so such a model does without a shared prefix.
    assert (total.num_computed_tokens < total.num_tokens) == (bool(preamble) and kind != "mistral")
    single = [e.encode([p]) for p in prompts(12)]
    assert batch.texts == tuple(b.texts[0] for b in single)
    assert batch.num_generated_tokens.tolist() == [int(b.num_generated_tokens[0]) for b in single]
    np.testing.assert_allclose(batch.vectors, np.concatenate([b.vectors for b in single]), atol=1e-3)
    if temperature and kind == "llama":
        assert len(set(batch.num_generated_tokens.tolist())) > 1  # some ended early, and left the batch


@pytest.mark.parametrize("layer", [-1, 1])
@pytest.mark.parametrize("pooling", ["last_token", "mean"])
@pytest.mark.parametrize("kind", KINDS)
def test_states_are_those_of_reading_prompt_and_answer(paths, kind, pooling, layer):
    tokenizer = transformers.AutoTokenizer.from_pretrained(paths[kind])
    model = transformers.AutoModel.from_pretrained(paths[kind], dtype=torch.float32).eval()
    common = SETTINGS | {"temperature": 1.0, "pooling": pooling, "layer": layer}
    from_answer = encoder(paths[kind], state_from="generated", **common).encode(prompts())
    from_prompt = encoder(paths[kind], **common).encode(prompts())
    silent = encoder(paths[kind], pooling=pooling, layer=layer).encode(prompts())
    np.testing.assert_allclose(from_prompt.vectors, silent.vectors, atol=1e-4)
    assert [t or None for t in from_prompt.texts] == list(from_answer.texts) and set(silent.texts) == {None}
    checked = 0
    for i, prompt in enumerate(prompts()):
        start = tokenizer(prompt.text())["input_ids"]
        answer = tokenizer(from_answer.texts[i] or "")["input_ids"]
        if not answer or len(answer) != from_answer.num_generated_tokens[i]:
            continue  # special tokens are not in the text
        with torch.no_grad():
            states = model(torch.tensor([start + answer]), output_hidden_states=True).hidden_states[layer][0]
        own = states[len(start) :]
        expected = own[-1] if pooling == "last_token" else own.mean(0)
        np.testing.assert_allclose(from_answer.vectors[i], expected.numpy(), atol=1e-3)
        checked += 1
    assert checked


def test_seed_temperature_and_prompt_decide_what_is_sampled(paths):
    def texts(**settings) -> tuple[str | None, ...]:
        return encoder(paths["llama"], **SETTINGS | settings).encode(prompts()).texts

    sampled = texts(temperature=1.0)
    assert texts(temperature=1.0) == sampled
    assert texts(temperature=1.0, seed=1) != sampled
    assert texts(temperature=1e-6) == texts() != sampled


def test_tokens_are_drawn_by_their_probability(paths):
    writer = encoder(paths["llama"], **SETTINGS | {"max_new_tokens": 1, "temperature": 0.7})._writer
    model = transformers.AutoModelForCausalLM.from_pretrained(paths["llama"], dtype=torch.float32).eval()
    ids, num = [5, 6, 7, 8], 500
    with torch.no_grad():
        expected = torch.softmax(model(torch.tensor([ids])).logits[0, -1] / 0.7, 0).numpy() * num
    chances = ((np.arange(num) + 0.5) / num)[:, None]
    answers = writer.write([ids] * num, chances).answers
    end = 2
    got = np.bincount([a[0] if a else end for a in answers], minlength=len(expected))
    assert np.abs(got - expected).max() <= 1.01
    assert (got > 0).sum() > 5


def ending(path: str, tmp_path: Path, ids: list[int]) -> str:
    """A copy of a model whose answers end with any of these tokens."""
    for file in Path(path).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = tmp_path / "generation_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"eos_token_id": ids}))
    return str(tmp_path)


def test_an_empty_answer(paths, tmp_path):
    path = ending(paths["llama"], tmp_path, list(range(5 + len(WORDS))))
    batch = encoder(path, **SETTINGS, state_from="generated").encode(prompts(3))
    assert batch.errors == ("the model wrote nothing",) * 3 and not batch.vectors.any()
    assert batch.texts == (None,) * 3 and not batch.num_generated_tokens.any()
    batch = encoder(path, **SETTINGS).encode(prompts(3))
    assert batch.errors == (None,) * 3 and batch.texts == ("",) * 3 and batch.vectors.any(axis=1).all()


def test_the_generation_configs_ends_count(paths, tmp_path):
    free = encoder(paths["llama"], **SETTINGS).encode(prompts())
    word = next(w for text in free.texts for w in text.split()[1:] if w in WORDS)
    path = ending(paths["llama"], tmp_path, [5 + WORDS.index(word)])
    for before, after in zip(free.texts, encoder(path, **SETTINGS).encode(prompts()).texts, strict=True):
        assert after == before.split(word)[0].strip()


def test_what_cannot_write_is_refused(paths, tmp_path):
    bert = make_model(tmp_path / "bert", "bert")
    with pytest.raises(EncoderError, match=r"generate needs a causal LM; .*bert.* is an encoder"):
        encoder(bert, generate=True)
    with pytest.raises(EncoderError, match=r"max_new_tokens 200: .* has 200 positions"):
        encoder(paths["llama"], generate=True, max_new_tokens=200)
    assert encoder(paths["llama"], generate=True, max_new_tokens=150).identity["max_tokens"] == 50


def test_no_head_is_loaded_where_nothing_is_written(paths):
    assert not hasattr(encoder(paths["llama"])._reader.base, "lm_head")
    assert type(encoder(paths["llama"])._reader.base).__name__ == "LlamaModel"
