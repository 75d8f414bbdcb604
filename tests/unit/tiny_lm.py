"""Language models with random weights and tokenizers of whole words, and prompts that they can read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from llm4msr.config import KnowledgeConfig
from llm4msr.knowledge.engines.encoder import Encoder
from llm4msr.knowledge.prompts import Liked, Prompt, user_prompt

NOUNS = ["tea", "coffee", "pan", "steel", "green", "big", "old", "new", "red"]
WORDS = [*NOUNS, "user", "liked", "in", "a", "b", "which", "interests", "does", "this", "show"]
TEMPLATE = (
    "{% for m in messages %}<turn> {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}<reply>{% endif %}"
)
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def prompts(n: int = 9) -> list[Prompt]:
    generator = np.random.default_rng(0)

    def events(k: int) -> tuple[str, ...]:
        return tuple(" ".join(generator.choice(NOUNS, 2)) for _ in range(k))

    return [
        user_prompt(str(i), "", [Liked("a", i, 0, events(i)), Liked("b", 1, 0, events(1))]) for i in range(1, n + 1)
    ]


def make_model(path: Path, kind: str = "llama", positions: int = 96, spread: float = 0.02, **tokenizer_settings) -> str:
    """Writes a model with random weights, of that standard deviation, and a tokenizer of whole words."""
    vocabulary = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", "<turn>", "<reply>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    chat_template = tokenizer_settings.pop("chat_template", None)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", **tokenizer_settings
    )
    fast.chat_template = chat_template
    fast.save_pretrained(path)
    torch.manual_seed(0)
    size = SIZES | {"vocab_size": len(vocabulary), "max_position_embeddings": positions, "initializer_range": spread}
    if kind == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**size, intermediate_size=48))
    elif kind == "mistral":  # fewer heads for keys and values, and attention over the last 24 tokens alone
        sizes = size | {"intermediate_size": 48, "num_key_value_heads": 2, "sliding_window": 24}
        model = transformers.MistralForCausalLM(transformers.MistralConfig(**sizes))
    elif kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=len(vocabulary), n_embd=32, n_layer=2, n_head=4, n_positions=positions, initializer_range=spread
        )
        model = transformers.GPT2LMHeadModel(config)
    elif kind == "bert":
        model = transformers.BertForMaskedLM(transformers.BertConfig(**size, intermediate_size=48))
    else:
        model = transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=len(vocabulary), d_model=32, num_layers=1, num_heads=2, d_ff=32, d_kv=16)
        )
    model.save_pretrained(path)
    return str(path)


def encoder(model: str, **settings) -> Encoder:
    return Encoder(KnowledgeConfig(model=model, **({"dtype": "float32"} | settings)), "cpu")


def alone(e: Encoder, items: list[Prompt]) -> np.ndarray:
    return np.concatenate([e.encode([p]).vectors for p in items])
