"""Loads the configuration: a recipe in TOML, the environment and flags, every key checked wherever it was written.

Later sources win: recipe file (TOML) < environment (``LLM4MSR_TRAIN__LEARNING_RATE=0.01``) < flags
(``--train.learning_rate 0.01``). A recipe that says ``extends = "other.toml"``, a file beside it, is that recipe with
its own keys instead; lists are replaced whole. A key that does not exist is refused, and the message names the nearest
one that does. Lists and tables are JSON on the command line and in the environment.
"""

from __future__ import annotations

import difflib
import json
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsError,
)

from llm4msr.config import ENV_PREFIX, Config, ConfigError

# Variables that share the prefix without being configuration: the test suite's shared data, the endpoint's tokens, how
# log lines look.
RESERVED_ENV = frozenset(
    {"LLM4MSR_CACHE", "LLM4MSR_LOG_FORMAT", "LLM4MSR_SHARED", "LLM4MSR_TOKENS", "LLM4MSR_TOKENS_FILE"}
)
# In a recipe: the one it is made from.
EXTENDS = "extends"


def load_config(argv: Sequence[str] = (), prog: str = "llm4msr", environ: Mapping[str, str] | None = None) -> Config:
    """Loads the configuration from ``--config FILE.toml``, environment and flags; later ones win.

    Args:
        argv: Command line without the program's name.
        prog: Name shown in ``--help``.
        environ: Environment; the process's own where None.

    Returns:
        The resolved, frozen configuration.

    Raises:
        ConfigError: A key is unknown, a value is not valid, or the file cannot be read.
        SystemExit: ``--help`` was asked for.
    """
    environ = os.environ if environ is None else environ
    known = dict(_fields(Config))
    path, flags = _take_config_flag(list(argv))
    for token in flags:
        if token.startswith("--") and (name := token[2:].split("=", 1)[0]) not in known and name != "help":
            raise ConfigError(_unknown(name, known, "on the command line"))
    tree = _read_toml(Path(path), known) if path else {}
    env_tree = _read_environment(environ, known)

    class Loader(Config):
        """The same fields, with this call's sources."""

        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            cli: CliSettingsSource[Any] = CliSettingsSource(
                settings_cls,
                cli_parse_args=flags,
                cli_prog_name=prog,
                cli_hide_none_type=True,
                cli_avoid_json=True,
                cli_exit_on_error=False,
            )
            # JSON text from the environment is read exactly as flags are, so both take lists and tables.
            return (cli, InitSettingsSource(settings_cls, env_tree), InitSettingsSource(settings_cls, tree))

    Loader.__doc__ = "--config FILE.toml reads a recipe; environment and flags override it. Lists and tables are JSON."
    try:
        loaded = Loader()
        return Config.model_construct(**{name: getattr(loaded, name) for name in Config.model_fields})
    except SettingsError as error:
        raise ConfigError(f"on the command line: {error}; see --help") from error
    except ValidationError as error:
        raise ConfigError(_explain(error, known)) from error


def config_from_dict(tree: Mapping[str, Any]) -> Config:
    """Rebuilds a configuration that was saved as JSON, without looking at environment or flags.

    Raises:
        ConfigError: As for `load_config`.
    """

    class Loader(Config):
        """The same fields, from the given tree alone."""

        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return (init_settings,)

    try:
        loaded = Loader(**tree)
        return Config.model_construct(**{name: getattr(loaded, name) for name in Config.model_fields})
    except ValidationError as error:
        raise ConfigError(_explain(error, dict(_fields(Config)))) from error


def with_values(tree: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a copy of a configuration's tree with other values at dotted keys; `config_from_dict` checks them."""
    changed = dict(tree)
    for key, value in values.items():
        section, _, rest = key.partition(".")
        if rest:
            inside = changed.get(section)
            changed[section] = with_values(inside if isinstance(inside, Mapping) else {}, {rest: value})
        else:
            changed[section] = value
    return changed


def _fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, field in model.model_fields.items():
        yield prefix + name, field
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _fields(field.annotation, f"{prefix}{name}.")


def _unknown(name: str, known: Mapping[str, Any], where: str) -> str:
    leaf = name.rsplit(".", 1)[-1]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6) or [
        k
        for k in known
        if k.rsplit(".", 1)[-1] in difflib.get_close_matches(leaf, {k.rsplit(".", 1)[-1] for k in known}, n=1)
    ]
    hint = f"Did you mean {near[0]}?" if near else f"Valid keys: {', '.join(sorted(known))}."
    return f"{name}: no such configuration key ({where}). {hint}"


def _take_config_flag(argv: list[str]) -> tuple[str | None, list[str]]:
    if sum(token == "--config" or token.startswith("--config=") for token in argv) > 1:
        raise ConfigError("--config is given more than once")
    for i, token in enumerate(argv):
        if token == "--config":
            if i + 1 == len(argv):
                raise ConfigError("--config needs a file: --config FILE.toml")
            return argv[i + 1], argv[:i] + argv[i + 2 :]
        if token.startswith("--config="):
            return token.split("=", 1)[1], argv[:i] + argv[i + 1 :]
    return None, argv


def _read_toml(path: Path, known: Mapping[str, Any], extending: tuple[Path, ...] = ()) -> dict[str, Any]:
    where = f"--config {path}"
    if extending:
        where = f"{extending[-1]}: {EXTENDS} = {os.path.relpath(path, extending[-1].parent)!r}"
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ConfigError(f"{where}: no such file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: not TOML: {error}") from error
    extended = tree.pop(EXTENDS, None)
    _check_keys(tree, known, f"in {path}", "")
    if extended is None:
        return tree
    if not isinstance(extended, str):
        raise ConfigError(f"{path}: {EXTENDS}: one file beside this one is needed (found {extended!r})")
    place, chain = path.parent / extended, (*extending, path)
    if place.resolve() in [step.resolve() for step in chain]:
        raise ConfigError(f"{path}: {EXTENDS} = {extended!r}: a recipe cannot extend itself")
    return _merged(_read_toml(place, known, chain), tree)


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    tree = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(tree.get(key), Mapping)
        tree[key] = _merged(tree[key], value) if both else value
    return tree


def _check_keys(tree: Mapping[str, Any], known: Mapping[str, Any], where: str, prefix: str) -> None:
    for key, value in tree.items():
        name = prefix + key
        if name not in known:
            raise ConfigError(_unknown(name, known, where))
        if any(k.startswith(f"{name}.") for k in known):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{name}: a section with keys of its own is needed (found {value!r} {where})")
            _check_keys(value, known, where, f"{name}.")


def _read_environment(environ: Mapping[str, str], known: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    # Whole sections come first: a variable of one key wins over that of its section.
    for variable, text in sorted(environ.items(), key=lambda item: (item[0].count("__"), item[0])):
        if not variable.startswith(ENV_PREFIX) or variable in RESERVED_ENV:
            continue
        name = variable[len(ENV_PREFIX) :].lower().replace("__", ".")
        if name not in known:
            raise ConfigError(_unknown(name, known, f"from the environment variable {variable}"))
        value: Any = text
        if text[:1] in "[{":
            try:
                value = json.loads(text)
            except json.JSONDecodeError as error:
                raise ConfigError(f"{variable}: not JSON: {error}") from error
        *sections, leaf = name.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        _check_keys({leaf: value}, known, f"from the environment variable {variable}", name.removesuffix(leaf))
        node[leaf] = value
    return tree


def _explain(error: ValidationError, known: Mapping[str, Any]) -> str:
    lines: dict[str, str] = {}
    for item in error.errors():
        every = dict(known) | dict(_item_fields(known, [part for part in item["loc"] if isinstance(part, int)]))
        name = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines[name] = _unknown(name, every, "in the configuration")
            continue
        while name and name not in every and not name.rsplit(".", 1)[-1].isdigit():
            name = name.rpartition(".")[0]  # what pydantic adds to tell the members of a union apart
        message = item["msg"].removeprefix("Value error, ")
        found = "" if isinstance(item["input"], (BaseModel, Mapping)) else f" (found {item['input']!r})"
        if name in lines:
            message = f"{lines[name].removeprefix(f'{name}: ').removesuffix(found)}, or: {message}"
        lines[name] = f"{name or 'configuration'}: {message}{found}"
    return "\n".join(lines.values())


def _item_fields(known: Mapping[str, Any], indices: Sequence[int]) -> Iterator[tuple[str, Any]]:
    """Yields the keys of the listed sections, such as ``data.table.features.0.name``."""
    for name, field in known.items():
        for item in get_args(field.annotation):
            if isinstance(item, type) and issubclass(item, BaseModel):
                for index in indices:
                    yield from _fields(item, f"{name}.{index}.")
