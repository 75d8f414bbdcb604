"""The configuration: nothing unknown gets in, later sources win, and its surface changes only on purpose."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel, ValidationError

from llm4msr.config import Config, ConfigError, SplitConfig, digest
from llm4msr.settings import config_from_dict, load_config

REPOSITORY = Path(__file__).resolve().parents[2]
GOLDEN = REPOSITORY / "tests" / "golden" / "config_surface.json"
RECIPES = sorted((REPOSITORY / "jobs" / "recipes").glob("*.toml"))
REFRESH = "python -m tests.invariant.test_config"
TABLE = ["--data.kind", "table", "--data.raw_uri", "raw", "--data.table.timestamp_column", "time"]


def fields(model: type[BaseModel], prefix: str = "") -> list[tuple[str, Any]]:
    """Returns the leaves of a configuration, by dotted name."""
    found = []
    for name, field in model.model_fields.items():
        nested = isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        found += fields(field.annotation, f"{prefix}{name}.") if nested else [(prefix + name, field)]
    return found


def load(*argv: str, env: dict[str, str] | None = None, toml: str | None = None, folder: Path | None = None) -> Config:
    flags = list(argv)
    if toml is not None:
        (folder / "recipe.toml").write_text(toml, encoding="utf-8")
        flags += ["--config", str(folder / "recipe.toml")]
    return load_config(flags, environ=env or {})


# ---------------------------------------------------------------- unknown keys


@pytest.mark.parametrize(
    ("toml", "key", "nearest"),
    [
        ('workspce_uri = "x"', "workspce_uri", "workspace_uri"),
        ("[train]\nlerning_rate = 1", "train.lerning_rate", "train.learning_rate"),
        ("[model.meta]\ntrunk_dim = [1]", "model.meta.trunk_dim", "model.meta.trunk_dims"),
        ("[trian]\nbatch_size = 1", "trian", "train"),
        ("learning_rate = 1", "learning_rate", "train.learning_rate"),
    ],
)
def test_unknown_key_in_a_file(tmp_path, toml, key, nearest):
    with pytest.raises(ConfigError) as error:
        load(toml=toml, folder=tmp_path)
    place = tmp_path / "recipe.toml"
    assert str(error.value) == f"{key}: no such configuration key (in {place}). Did you mean {nearest}?"


@pytest.mark.parametrize(
    ("variable", "key", "nearest"),
    [
        ("LLM4MSR_WORKSPACE_URL", "workspace_url", "workspace_uri"),
        ("LLM4MSR_TRAIN__LERNING_RATE", "train.lerning_rate", "train.learning_rate"),
        ("LLM4MSR_DATA__SYNTHETIC__NUM_USER", "data.synthetic.num_user", "data.synthetic.num_users"),
    ],
)
def test_unknown_key_in_the_environment(variable, key, nearest):
    with pytest.raises(ConfigError) as error:
        load(env={variable: "1"})
    assert str(error.value) == (
        f"{key}: no such configuration key (from the environment variable {variable}). Did you mean {nearest}?"
    )


@pytest.mark.parametrize("form", ["{}=1", "{} 1"])
@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("workspaceuri", "workspace_uri"),
        ("train.lr_rate", "train.learning_rate"),
        ("experiment.seed", "experiment.seeds"),
    ],
)
def test_unknown_flag(form, key, nearest):
    flags = form.format(f"--{key}").split(" ")
    with pytest.raises(ConfigError, match=re.escape(f"{key}: no such configuration key (on the command line). ")) as e:
        load(*flags)
    assert str(e.value).endswith(f"Did you mean {nearest}?")


def test_unknown_key_with_nothing_near_lists_the_valid_ones():
    with pytest.raises(ConfigError, match=r"zzz: .* Valid keys: .*data\.kind, .*train\.batch_size"):
        load("--zzz=1")


@pytest.mark.parametrize("place", ["flag", "environment", "file"])
def test_unknown_key_inside_a_listed_feature(tmp_path, place):
    feature = {"nam": "x", "source": "context", "kind": "numeric"}
    with pytest.raises(ConfigError) as error:
        if place == "flag":
            load(*TABLE, "--data.table.features", json.dumps([feature]))
        elif place == "environment":
            load(*TABLE, env={"LLM4MSR_DATA__TABLE__FEATURES": json.dumps([feature])})
        else:
            load(
                *TABLE,
                toml='[[data.table.features]]\nnam = "x"\nsource = "context"\nkind = "numeric"',
                folder=tmp_path,
            )
    assert str(error.value).splitlines() == [
        "data.table.features.0.name: Field required",
        "data.table.features.0.nam: no such configuration key (in the configuration). "
        "Did you mean data.table.features.0.name?",
    ]


def test_unknown_key_in_a_section_given_as_json():
    with pytest.raises(ConfigError, match=r"train\.lerning_rate: .*variable LLM4MSR_TRAIN\).*train\.learning_rate\?"):
        load(env={"LLM4MSR_TRAIN": '{"lerning_rate": 1}'})
    with pytest.raises(ConfigError, match=r"train\.lerning_rate: no such .*Did you mean train\.learning_rate\?"):
        config_from_dict({"train": {"lerning_rate": 1}})


def test_foreign_and_reserved_variables_are_left_alone():
    assert load(env={"LLM4MSR_SHARED": "/x", "TRAIN__BATCH_SIZE": "3", "PATH": "/bin"}) == load()


# ---------------------------------------------------------------- sources


def test_flags_win_over_environment_over_file(tmp_path):
    toml = 'workspace_uri = "file"\n[train]\nbatch_size = 16\nmax_epochs = 10\npatience = 10'
    env = {"LLM4MSR_TRAIN__MAX_EPOCHS": "20", "LLM4MSR_TRAIN__PATIENCE": "20"}
    config = load("--train.patience=30", env=env, toml=toml, folder=tmp_path)
    assert (config.workspace_uri, config.train.batch_size) == ("file", 16)
    assert (config.train.max_epochs, config.train.patience) == (20, 30)
    assert config.train.learning_rate == load().train.learning_rate


def test_one_key_wins_over_its_section_whatever_the_order():
    pair = {"LLM4MSR_TRAIN__BATCH_SIZE": "64", "LLM4MSR_TRAIN": '{"batch_size": 8, "patience": 9}'}
    for env in (pair, dict(reversed(pair.items()))):
        train = load(env=env).train
        assert (train.batch_size, train.patience) == (64, 9)


def test_the_process_environment_is_read_when_none_is_given(monkeypatch):
    monkeypatch.setenv("LLM4MSR_TRAIN__BATCH_SIZE", "80")
    assert load_config([]).train.batch_size == 80
    assert config_from_dict({}).train.batch_size == 2048  # a saved configuration is read as it was saved


def test_lists_and_tables_are_json_on_flags_and_in_the_environment():
    features = [{"name": "x", "source": "context", "kind": "numeric"}, {"name": "y", "source": "item", "kind": "text"}]
    settings = {
        "experiment.seeds": [3, 4],
        "experiment.knowledge": ["none", "llm"],
        "model.hidden_dims": [8],
        "data.table.items": "items.csv",
        "data.table.features": features,
        "data.table.scenario_descriptions": {"Search": "typed"},
        "data.table.item_text_columns": ["title"],
    }
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in settings.items()}
    by_flag = load(*TABLE, *(f"--{key}={text}" for key, text in texts.items()))
    variables = {"LLM4MSR_" + key.replace(".", "__").upper(): text for key, text in texts.items()}
    by_variable = load(*TABLE, env=variables)
    assert by_flag == by_variable
    assert by_flag.experiment.seeds == (3, 4)
    assert [f.name for f in by_flag.data.table.features] == ["x", "y"]
    assert by_flag.data.table.scenario_descriptions == {"Search": "typed"}


def test_numbers_booleans_and_auto_are_read_from_text():
    config = load(
        "--train.num_workers=2",
        "--model.meta.user_level=false",
        "--train.learning_rate=1e-4",
        "--knowledge.layer",
        "-2",
    )
    assert config.train.num_workers == 2 and config.knowledge.num_actors == "auto"
    assert config.model.meta.user_level is False
    assert (config.train.learning_rate, config.knowledge.layer) == (1e-4, -2)
    assert load("--train.num_workers", "auto").train.num_workers == "auto"


# ---------------------------------------------------------------- bad values


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train.batch_size=0"], "train.batch_size: Input should be greater than or equal to 1 (found '0')"),
        (["--data.kind=kuaisa"], "data.kind: Input should be 'kuaisar', .* (found 'kuaisa')"),
        (["--train.num_workers=many"], "train.num_workers: .*integer.*, or: Input should be 'auto' (found 'many')"),
        (["--model.hidden_dims=[8, 0]"], "model.hidden_dims.1: .*greater than or equal to 1 (found 0)"),
        (["--train.learning_rate=inf"], "train.learning_rate: .*finite number (found 'inf')"),
        (["--experiment.seeds=[-1]"], "experiment.seeds.0: .*greater than or equal to 0 (found -1)"),
        (["--experiment.seeds=[1"], "on the command line: .*experiment.seeds.*; see --help"),
        (["--train.batch_size"], "on the command line: .*train.batch_size: expected one argument; see --help"),
        (["extra"], "on the command line: .*unrecognized arguments: extra; see --help"),
        (["--config"], "--config needs a file: --config FILE.toml"),
        (["--config", "a", "--config=b"], "--config is given more than once"),
        (["--config", "/no/such.toml"], "--config /no/such.toml: no such file"),
    ],
)
def test_bad_flag_names_the_key_and_what_was_found(flags, message):
    pattern = re.escape(message).replace(r"\.\*", ".*")
    with pytest.raises(ConfigError, match=f"^{pattern}$"):
        load(*flags)


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("train = 3", "train: a section with keys of its own is needed \\(found 3 in .*recipe.toml\\)"),
        ("a ==", "--config .*recipe.toml: not TOML: .*line 1"),
        ("workspace_uri = 3", "workspace_uri: Input should be a valid string \\(found 3\\)"),
        (
            "[train]\nbatch_size = 'x'\n[model]\ndropout = 1.0",
            "model.dropout: .*less than 1 \\(found 1.0\\)\ntrain.batch_size: .*valid integer.*\\(found 'x'\\)",
        ),
    ],
)
def test_bad_value_in_a_file(tmp_path, toml, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        load(toml=toml, folder=tmp_path)


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"LLM4MSR_EXPERIMENT__SEEDS": "[1"}, "LLM4MSR_EXPERIMENT__SEEDS: not JSON: "),
        (
            {"LLM4MSR_TRAIN": "abc", "LLM4MSR_TRAIN__BATCH_SIZE": "3"},
            "train: a section with keys of its own is needed \\(found 'abc' from the environment variable",
        ),
        (
            {"LLM4MSR_DATA": '{"table": 3}', "LLM4MSR_DATA__TABLE__USERS": "u.csv"},
            "data.table: a section .*\\(found 3 from the environment variable LLM4MSR_DATA\\)",
        ),
    ],
)
def test_bad_variable(env, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        load(env=env)


FEATURE = '[{"name": "x", "source": "user", "kind": "numeric"}]'

# ---------------------------------------------------------------- the tree itself


def test_every_field_is_documented_and_shown_by_help(capsys):
    with pytest.raises(SystemExit) as stop:
        load("--help")
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name, field in fields(Config):
        assert field.description and field.description.strip(), name
        assert f"--{name} " in shown, name
        assert " ".join(field.description.split()) in shown, name


def test_frozen_everywhere():
    config = load()
    for section, key in ((config, "workspace_uri"), (config.train, "batch_size"), (config.model.meta, "rank")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, key, 1)


def test_saved_and_rebuilt_is_equal():
    config = load(
        *TABLE,
        "--data.table.users=u.csv",
        "--data.table.features",
        FEATURE,
        "--experiment.seeds=[5]",
        "--train.num_workers=4",
        '--data.table.scenario_descriptions={"a": "b"}',
    )
    for original in (config, load()):
        saved = json.loads(json.dumps(original.model_dump(mode="json")))
        rebuilt = config_from_dict(saved)
        assert rebuilt == original and type(rebuilt) is Config
        assert rebuilt.model_dump(mode="json") == saved
        assert digest(rebuilt) == digest(original)


def test_digest_depends_on_content_only():
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    assert len({digest(v) for v in ({"a": 1}, {"a": 2}, {"a": "1"}, {"b": 1}, {"a": [1]}, {"a": None}, {})}) == 7
    config = load()
    assert digest(config.train) == digest(load("--train.batch_size=2048").train)
    for flag in ("--train.batch_size=1024", "--train.embedding_l2=1e-9", "--train.num_workers=1"):
        assert digest(load(flag).train) != digest(config.train), flag
        assert digest(load(flag).data) == digest(config.data)
    assert digest({"section": config.train}) == digest({"section": config.train.model_dump(mode="json")})
    assert re.fullmatch("[0-9a-f]{16}", digest(config))
    with pytest.raises(TypeError, match="set has no digest"):
        digest({"a": {1}})


def test_digest_is_the_same_in_another_process():
    code = (
        "from llm4msr.config import digest; from llm4msr.settings import load_config; "
        "print(digest(load_config([], environ={})))"
    )
    env = os.environ | {"PYTHONHASHSEED": "77"}
    output = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env=env, capture_output=True, check=True)
    assert output.stdout.decode().strip() == digest(load())


def test_sections_check_when_built_directly():
    with pytest.raises(ValidationError, match="valid_from and test_from go together"):
        SplitConfig(test_from="2023-01-01")


def surface(model: type[BaseModel] = Config, prefix: str = "") -> dict[str, dict[str, Any]]:
    """Returns type (as JSON schema) and default of every key, those of listed sections included."""
    types = model.model_json_schema()["properties"]
    found = {}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= surface(field.annotation, f"{prefix}{name}.")
            continue
        kept = {key: value for key, value in types[name].items() if key not in ("default", "description", "title")}
        default = "required" if field.is_required() else json.loads(json.dumps(field.default))
        found[prefix + name] = {"type": kept, "default": default}
        for item in get_args(field.annotation):
            if isinstance(item, type) and issubclass(item, BaseModel):
                found |= surface(item, f"{prefix}{name}[].")
    return dict(sorted(found.items()))


def test_surface_changes_only_on_purpose():
    golden, now = json.loads(GOLDEN.read_text(encoding="utf-8")), surface()
    changes = [f"+ {name}: {now[name]}" for name in now.keys() - golden.keys()]
    changes += [f"- {name}: {golden[name]}" for name in golden.keys() - now.keys()]
    changes += [f"~ {k}: {golden[k]} -> {now[k]}" for k in golden.keys() & now.keys() if golden[k] != now[k]]
    listing = "\n".join(sorted(changes, key=lambda line: line[2:]))
    assert not changes, f"the configuration's surface changed:\n{listing}\nIf this is meant: {REFRESH}"


@pytest.mark.parametrize("recipe", RECIPES, ids=[path.stem for path in RECIPES])
def test_recipe_loads(recipe):
    config = load_config(["--config", str(recipe)], environ={})
    assert config_from_dict(config.model_dump(mode="json")) == config


def test_there_are_recipes():
    assert "demo" in [path.stem for path in RECIPES]


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in surface().items()]
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
