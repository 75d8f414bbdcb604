"""One pass over real tiny models: padding without a mask, a shared prefix, what a model is found to allow."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from tiny_lm import TEMPLATE, WORDS, alone, encoder, make_model, prompts

from llm4msr.knowledge.engines.devices import count_parameters, peak_flops
from llm4msr.knowledge.engines.encoder import EncoderError
from llm4msr.knowledge.engines.forward import Reader
from llm4msr.knowledge.engines.interface import BatchDone
from llm4msr.knowledge.prompts import Prompt

PREAMBLE = " ".join(WORDS[i % 9] for i in range(20))


def plain(e):
    """The same encoder without a shared prefix."""
    e._reader.shares_prefix = False
    return e


def computed(e, items) -> tuple[np.ndarray, BatchDone]:
    done: list[BatchDone] = []
    batch = e.encode(items, done.append)
    assert batch.errors == (None,) * len(items)
    return batch.vectors, sum(done, BatchDone())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("pooling", ["last_token", "mean"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])
def test_a_shared_prefix_changes_the_cost_and_nothing_else(tmp_path, kind, pooling, attention):
    settings = {"pooling": pooling, "preamble": PREAMBLE, "batch_tokens": 150, "attention": attention}
    path = make_model(tmp_path / kind, kind, spread=0.2)
    items = prompts(12)
    shared, cheap = computed(encoder(path, **settings), items)
    full, dear = computed(plain(encoder(path, **settings)), items)
    np.testing.assert_allclose(shared, full, atol=1e-4)
    np.testing.assert_allclose(shared, alone(encoder(path, **settings), items), atol=1e-4)
    assert cheap.num_tokens == dear.num_tokens
    # Every prompt begins with the preamble and "Liked in a"; the unknown words "(1):" and so on are one token too.
    assert dear.num_computed_tokens - cheap.num_computed_tokens == (len(items) - 1) * (len(PREAMBLE.split()) + 4)
    unlike, _ = computed(encoder(path, **settings | {"preamble": ""}), items)
    assert np.abs(unlike - full).max() > 1e-2


@pytest.mark.shared
@pytest.mark.parametrize("pooling", ["last_token", "mean"])
@pytest.mark.parametrize("layer", [-1, 2])
def test_a_shared_prefix_on_a_real_model(shared, pooling, layer):
    settings = {"pooling": pooling, "layer": layer, "preamble": "One day, a girl named Lily went to the park.",
                "batch_tokens": 400}  # fmt: skip
    path = str(shared / "models" / "stories260k")
    with_prefix, cheap = computed(encoder(path, **settings), prompts())
    without, dear = computed(plain(encoder(path, **settings)), prompts())
    np.testing.assert_allclose(with_prefix, without, atol=1e-4)
    assert cheap.num_computed_tokens < 0.85 * dear.num_computed_tokens


def test_a_prefix_in_bfloat16_is_close(tmp_path):
    path = make_model(tmp_path / "m", "mistral", spread=0.2)
    exact, _ = computed(plain(encoder(path, preamble=PREAMBLE)), prompts())
    e = encoder(path, preamble=PREAMBLE, dtype="bfloat16")
    assert e._reader.shares_prefix
    rough, _ = computed(e, prompts())
    cosine = (exact * rough).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(rough, axis=1)
    assert cosine.min() > 0.999


class Backwards(torch.nn.Module):
    """A model in which every token sees the mean over all of them."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.inner.get_input_embeddings()

    def forward(self, **arguments):
        out = self.inner(**arguments)
        mask = arguments.get("attention_mask", torch.ones(out.last_hidden_state.shape[:2]))[..., None]
        mean = (out.last_hidden_state * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
        out.last_hidden_state = out.last_hidden_state + mean
        return out


class Forgetful(Backwards):
    """A causal model that takes a cache and does not read it."""

    def forward(self, past_key_values=None, **arguments):
        return self.inner(**arguments)


def test_what_a_model_allows_is_tried_out(tmp_path):
    inner = transformers.AutoModel.from_pretrained(make_model(tmp_path / "m", spread=0.2), dtype=torch.float32).eval()
    inner.config.use_cache = False

    def reader(model: torch.nn.Module) -> Reader:
        return Reader(model, "last_token", -1, 0, causal=True)

    assert (reader(inner).unmasked, reader(inner).shares_prefix) == (True, True)
    assert (reader(Backwards(inner)).unmasked, reader(Backwards(inner)).shares_prefix) == (False, False)
    assert (reader(Forgetful(inner)).unmasked, reader(Forgetful(inner)).shares_prefix) == (True, False)
    rows = [[3, 4, 5, 6, 7], [8, 9]]
    masked = reader(Backwards(inner))
    together = masked.read(rows)[0]
    torch.testing.assert_close(together, torch.cat([masked.read([r])[0] for r in rows]), atol=1e-4, rtol=0)


def test_a_prefix_is_left_as_it_was(tmp_path):
    reader = encoder(make_model(tmp_path / "m", spread=0.2))._reader
    prefix = reader.prefix([3, 4, 5])
    first = reader.read([[6, 7], [8]], prefix)[0]
    torch.testing.assert_close(reader.read([[6, 7], [8]], prefix)[0], first, atol=0, rtol=0)
    assert prefix.cache.get_seq_length() == prefix.num_tokens == 3


def test_the_chat_templates_head_is_shared(tmp_path):
    template = "{% for m in messages %}" + PREAMBLE + " " + TEMPLATE.split("%}", 1)[1]
    e = encoder(make_model(tmp_path / "m", spread=0.2, chat_template=template))
    together, cost = computed(e, prompts())
    np.testing.assert_allclose(together, alone(e, prompts()), atol=1e-4)
    assert cost.num_computed_tokens < cost.num_tokens


def test_the_preamble_stands_before_every_prompt_and_is_never_cut(tmp_path):
    path = make_model(tmp_path / "m", spread=0.2)
    items = prompts(20)
    by_hand = [Prompt("user", "u", "", (), f"{PREAMBLE}\n{p.text()}") for p in items]
    np.testing.assert_allclose(
        encoder(path, preamble=PREAMBLE).encode(items).vectors, encoder(path).encode(by_hand).vectors, atol=1e-4
    )
    cut = encoder(path, preamble=PREAMBLE, max_tokens=44).encode(items)
    assert cut.num_tokens.max() <= 44 and cut.num_dropped_events.max() > 0 and cut.errors == (None,) * 20
    none = encoder(path, preamble=PREAMBLE, max_tokens=24).encode(items)
    assert all("alone exceeds 24 tokens" in error for error in none.errors)


def test_chunks_are_put_together_in_order(tmp_path):
    e = encoder(make_model(tmp_path / "m", spread=0.2), batch_tokens=100)
    items = prompts(20)
    expected = e.encode(items).vectors
    e._chunk = 7
    np.testing.assert_allclose(e.encode(items).vectors, expected, atol=1e-4)
    assert e.encode([]).vectors.shape == (0, 32)


def test_a_compiled_model_gives_the_same(tmp_path):
    path = make_model(tmp_path / "m", spread=0.2)
    expected = encoder(path).encode(prompts(3)).vectors
    np.testing.assert_allclose(encoder(path, compile=True).encode(prompts(3)).vectors, expected, atol=1e-4)


def test_flash_attention_that_is_not_there_is_named(tmp_path):
    if transformers.utils.is_flash_attn_2_available():
        pytest.skip("flash-attn is installed")
    with pytest.raises(EncoderError, match=r"'flash_attention_2' needs a GPU and the package flash-attn"):
        encoder(make_model(tmp_path / "m"), attention="flash_attention_2")


def test_hardware(tmp_path):
    hardware = encoder(make_model(tmp_path / "m")).hardware
    # Two layers of attention (4 x 32 x 32), MLP (3 x 32 x 48) and two norms (32 each), and the last norm.
    assert hardware.num_parameters == 2 * (4 * 32 * 32 + 3 * 32 * 48 + 64) + 32
    assert (hardware.device, hardware.peak_flops) == ("cpu", None)
    assert count_parameters(torch.nn.ModuleDict({"experts": torch.nn.Linear(2, 2)})) is None


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H200", "bfloat16", 989e12),
        ("NVIDIA H100 80GB HBM3", "float16", 989e12),
        ("NVIDIA H100 PCIe", "bfloat16", 756e12),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312e12),
        ("NVIDIA A10", "bfloat16", 125e12),
        ("NVIDIA L40S", "bfloat16", 362e12),
        ("NVIDIA L4", "bfloat16", 121e12),
        ("Tesla T4", "float16", 65e12),
        ("Tesla T4", "bfloat16", None),
        ("Tesla V100-SXM2-16GB", "float16", 125e12),
        ("NVIDIA H200", "float32", None),
        ("NVIDIA H200 MIG 1g.18gb", "bfloat16", None),
        ("NVIDIA GeForce GTX 1080", "float16", None),
        ("cpu", "bfloat16", None),
    ],
)
def test_peak_flops(name, dtype, peak):
    assert peak_flops(name, dtype) == peak
