"""Who may call."""

from __future__ import annotations

import os

import pytest

from llm4msr.config import ConfigError
from serve import tokens as module
from serve.tokens import Tokens

ONE, TWO, THREE = "first-token-0123456", "second-token-0123456", "third-token-ü-0123456"


def test_several_are_valid_at_a_time():
    tokens = Tokens({"LLM4MSR_TOKENS": f"{ONE}, {TWO},"})
    accepted = [ONE, TWO, THREE, ONE[:-1], ONE + "x", "", f"{ONE}, {TWO}"]
    assert [tokens.accepts(f"Bearer {token}") for token in accepted] == [True, True, False, False, False, False, False]


@pytest.mark.parametrize(
    ("header", "accepted"),
    [
        (f"Bearer {ONE}", True),
        (f"bearer   {ONE} ", True),
        (ONE, False),
        (f"Basic {ONE}", False),
        (f"Bearer{ONE}", False),
        ("Bearer ", False),
        ("", False),
        (None, False),
        (f"Bearer \udcff{ONE}", False),
    ],
)
def test_only_a_bearer_token_counts(header, accepted):
    assert Tokens({"LLM4MSR_TOKENS": ONE}).accepts(header) is accepted


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LOOK_EVERY_S", 0.0)
    path = tmp_path / "tokens"

    def write(text: str, age: int = 0) -> None:
        path.write_text(text, encoding="utf-8")
        os.utime(path, (1_000_000 + age, 1_000_000 + age))

    write(f"# of the shop\n{ONE}\n\n  {TWO}  \n")
    return path, write


def test_a_file_is_read_again_when_it_changes(file):
    path, write = file
    tokens = Tokens({"LLM4MSR_TOKENS_FILE": str(path)})
    assert tokens.accepts(f"Bearer {ONE}") and tokens.accepts(f"Bearer {TWO}")
    assert not tokens.accepts("Bearer # of the shop")
    write(f"{TWO}\n{THREE}", age=1)
    assert not tokens.accepts(f"Bearer {ONE}")
    assert tokens.accepts(f"Bearer {TWO}") and tokens.accepts(f"Bearer {THREE}")


@pytest.mark.parametrize("text", ["", "# nothing\n", "short\n", None])
def test_a_file_that_becomes_useless_locks_nobody_out(file, text, caplog):
    path, write = file
    tokens = Tokens({"LLM4MSR_TOKENS_FILE": str(path)})
    if text is None:
        path.unlink()
    else:
        write(text, age=1)
    assert tokens.accepts(f"Bearer {ONE}") and not tokens.accepts("Bearer short")
    assert "the tokens of before stay valid" in caplog.text
    write(THREE, age=2)
    assert tokens.accepts(f"Bearer {THREE}") and not tokens.accepts(f"Bearer {ONE}")


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({}, "set LLM4MSR_TOKENS .* or LLM4MSR_TOKENS_FILE .* auth = 'off'"),
        ({"LLM4MSR_TOKENS": ONE, "LLM4MSR_TOKENS_FILE": "x"}, "one of them"),
        ({"LLM4MSR_TOKENS": ""}, "LLM4MSR_TOKENS: no token: one of at least 16 characters"),
        ({"LLM4MSR_TOKENS": f"{ONE},hunter2"}, "LLM4MSR_TOKENS: token 2 has fewer than 16 characters"),
        ({"LLM4MSR_TOKENS_FILE": "/no/such"}, "LLM4MSR_TOKENS_FILE=/no/such: cannot be read: "),
    ],
)
def test_no_usable_token_is_an_error_that_shows_none(environ, message):
    with pytest.raises(ConfigError, match=message) as error:
        Tokens(environ)
    assert "hunter2" not in str(error.value) and ONE not in str(error.value)
