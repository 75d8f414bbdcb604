"""Prompts that cannot be read are errors of their own; cutting is tested with the prompts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llm4msr.knowledge.engines.fitting import Fitted, fit, fit_each
from llm4msr.knowledge.prompts import Liked, Prompt, user_prompt


def letters(texts: list[str]) -> list[list[int]]:
    if any("boom" in text for text in texts):
        raise UnicodeError("cannot read boom")
    return [[ord(letter) % 100 for letter in text] for text in texts]


def prompt(tail: str) -> Prompt:
    return Prompt("user", "u", "", (), tail)


def test_each_for_itself():
    items = [prompt("why"), prompt(" \n\t"), prompt("boom"), prompt(""), prompt("x" * 30), prompt("how")]
    fitted = fit_each(items, letters, 20, 100)
    assert [f.error for f in fitted] == [
        None,
        "the prompt is empty",
        "the tokenizer raised UnicodeError: cannot read boom",
        "the prompt is empty",
        "the instruction alone exceeds 20 tokens; raise knowledge.max_tokens",
        None,
    ]
    assert [len(f.token_ids) for f in fitted] == [3, 0, 0, 0, 0, 3]


def test_an_id_that_the_model_does_not_have():
    fitted = fit_each([prompt("abc"), prompt("a")], letters, 20, 99)
    assert fitted[0] == Fitted([], error="token id 99 is beyond the model's 99 embeddings")
    assert fitted[1] == Fitted([97])


def test_a_text_of_no_tokens():
    assert fit_each([prompt("x")], lambda texts: [[] for _ in texts], 20, 9)[0].error == "the prompt has no tokens"


@given(st.lists(st.sampled_from(["tea", "boom", "green pan", "steel"]), max_size=12))
def test_the_others_are_as_without_those_that_raise(words):
    items = [user_prompt("u", "", [Liked("a", 1, 0, (word, word + " cup"))]) for word in words]
    good = iter(fit([p for p, w in zip(items, words, strict=True) if w != "boom"], letters, 95))
    for word, fitted in zip(words, fit_each(items, letters, 95, 100), strict=True):
        if word == "boom":
            assert fitted.error == "the tokenizer raised UnicodeError: cannot read boom"
        else:
            assert fitted == next(good)
