"""A recipe made from another one."""

from __future__ import annotations

import pytest

from llm4msr.config import ConfigError
from llm4msr.settings import load_config


def load(folder, *argv, **recipes):
    """Writes recipes, one a keyword, and loads the one that was named last."""
    for name, text in recipes.items():
        (folder / f"{name}.toml").write_text(text, encoding="utf-8")
    return load_config(["--config", str(folder / f"{name}.toml"), *argv], environ={})


def test_own_keys_win_and_the_others_stay(tmp_path):
    config = load(
        tmp_path,
        "--train.patience=7",
        first='workspace_uri = "a"\n[train]\nbatch_size = 16\nmax_epochs = 11\n[experiment]\nseeds = [1, 2, 3]',
        second='extends = "first.toml"\n[train]\nbatch_size = 32\n[data.split]\nvalid_fraction = 0.3',
        third='extends = "second.toml"\n[experiment]\nseeds = [4]\n[data.split]\ntest_fraction = 0.3',
    )
    assert (config.workspace_uri, config.experiment.seeds) == ("a", (4,))
    assert (config.train.batch_size, config.train.max_epochs, config.train.patience) == (32, 11, 7)
    assert (config.data.split.valid_fraction, config.data.split.test_fraction) == (0.3, 0.3)


def test_the_file_is_looked_for_beside_the_one_that_names_it(tmp_path, monkeypatch):
    (tmp_path / "inside").mkdir()
    (tmp_path / "first.toml").write_text("[train]\nbatch_size = 16", encoding="utf-8")
    (tmp_path / "inside" / "second.toml").write_text('extends = "../first.toml"', encoding="utf-8")
    monkeypatch.chdir(tmp_path / "inside")
    assert load_config(["--config", "second.toml"], environ={}).train.batch_size == 16


@pytest.mark.parametrize(
    ("recipes", "message"),
    [
        ({"one": 'extends = "none.toml"'}, r"one\.toml: extends = 'none\.toml': no such file$"),
        ({"one": 'extends = "."'}, r"one\.toml: extends = '\.': no such file$"),
        ({"one": "extends = 3"}, r"one\.toml: extends: one file beside this one is needed \(found 3\)$"),
        ({"one": 'extends = ["a"]'}, r"one\.toml: extends: one file beside this one is needed \(found \['a'\]\)$"),
        ({"one": 'extends = "one.toml"'}, r"one\.toml: extends = 'one\.toml': a recipe cannot extend itself$"),
        (
            {"one": 'extends = "two.toml"', "two": 'extends = "one.toml"'},
            r"one\.toml: extends = 'two\.toml': a recipe cannot extend itself$",
        ),
        ({"one": "a = ", "two": 'extends = "one.toml"'}, r"two\.toml: extends = 'one\.toml': not TOML: "),
        ({"one": "[train]\nrate = 1", "two": 'extends = "one.toml"'}, r"train\.rate: no such .*\(in .*one\.toml\)"),
        ({"one": '[train]\nextends = "a.toml"'}, r"train\.extends: no such configuration key"),
    ],
)
def test_what_cannot_be_extended(tmp_path, recipes, message):
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, **recipes)
