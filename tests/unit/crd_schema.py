"""The Kubernetes API server's check of custom resources, as far as their definitions say it, without a server.

`kubectl apply` drops fields that a definition does not know, in silence; here they are errors. Defaults are filled in
before anything is required, as the server does. Not evaluated: rules in CEL (x-kubernetes-validations), what the
operator's own code refuses, and sizes of integers.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema
import yaml

TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
# A definition says of metadata no more than that it is an object; the server knows its fields. Those used here:
METADATA = {
    "type": "object",
    "required": ["name"],
    "properties": {"name": {"type": "string"}, "namespace": {"type": "string"}, "labels": TEXTS, "annotations": TEXTS},
}


class CustomResource:
    """One kind and version.

    Args:
        schema: Its openAPIV3Schema.
    """

    def __init__(self, schema: dict[str, Any]) -> None:
        self.schema = {**schema, "properties": {**schema["properties"], "metadata": METADATA}}
        self.validator = jsonschema.Draft202012Validator(strict(self.schema))

    def problems(self, document: dict[str, Any]) -> list[str]:
        """Returns what is wrong with an object, each with its place; nothing where it is valid."""
        filled = with_defaults(self.schema, deepcopy(document))
        errors = [f"{error.json_path}: {error.message}" for error in self.validator.iter_errors(filled)]
        return errors + list(_duplicates(self.schema, filled, "$"))


def read_definition(folder: Path, kind: str) -> CustomResource:
    """Reads the gzipped definition of a kind of ray.io from a folder, in the version that is stored."""
    text = gzip.decompress((folder / f"ray.io_{kind.lower()}s.yaml.gz").read_bytes())
    versions = yaml.load(text, Loader=yaml.CSafeLoader)["spec"]["versions"]
    return CustomResource(next(v["schema"]["openAPIV3Schema"] for v in versions if v["storage"]))


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """Returns a plain JSON schema that knows no other fields than those that are named."""
    kept = {key: value for key, value in schema.items() if key not in ("description", "default", "format")}
    plain = {key: value for key, value in kept.items() if not key.startswith("x-kubernetes-")}
    if schema.get("x-kubernetes-int-or-string"):
        plain |= {"type": ["integer", "string"]}
    if schema.get("nullable"):
        plain["type"] = [plain["type"], "null"]
    if "properties" in schema:
        plain["properties"] = {name: strict(inner) for name, inner in schema["properties"].items()}
    if isinstance(schema.get("additionalProperties"), dict):
        plain["additionalProperties"] = strict(schema["additionalProperties"])
    elif schema.get("type") == "object" and not schema.get("x-kubernetes-preserve-unknown-fields"):
        plain.setdefault("additionalProperties", False)
    if "items" in schema:
        plain["items"] = strict(schema["items"])
    return plain


def with_defaults(schema: dict[str, Any], value: Any) -> Any:
    """Fills in, in place, the defaults of fields that are not there; returns the value."""
    if isinstance(value, dict):
        for name, inner in schema.get("properties", {}).items():
            if name not in value and "default" in inner:
                value[name] = deepcopy(inner["default"])
            if name in value:
                with_defaults(inner, value[name])
        more = schema.get("additionalProperties")
        if isinstance(more, dict):
            for inner in value.values():
                with_defaults(more, inner)
    elif isinstance(value, list):
        for inner in value:
            with_defaults(schema.get("items", {}), inner)
    return value


def _duplicates(schema: dict[str, Any], value: Any, place: str) -> Iterator[str]:
    """Yields entries of a list that has names where one name is there twice: the server refuses the object."""
    if isinstance(value, dict):
        more = schema.get("additionalProperties")
        for name, inner in value.items():
            known = schema.get("properties", {}).get(name, more if isinstance(more, dict) else {})
            yield from _duplicates(known, inner, f"{place}.{name}")
    elif isinstance(value, list):
        names = schema.get("x-kubernetes-list-map-keys", [])
        seen = [tuple(entry.get(name) for name in names) for entry in value if names and isinstance(entry, dict)]
        yield from (f"{place}: {name} is there twice" for name in sorted(set(seen), key=str) if seen.count(name) > 1)
        for number, inner in enumerate(value):
            yield from _duplicates(schema.get("items", {}), inner, f"{place}[{number}]")
