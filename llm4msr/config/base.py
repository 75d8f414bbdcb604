"""What all sections of the configuration share: their base class, the types of their fields, and their digest."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Auto = Literal["auto"]
Fraction = Annotated[float, Field(ge=0, lt=1)]
PositiveInt = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0)]  # numpy takes no other


def _single(value: Any) -> Any:
    """Returns the value of a list of one: the command line makes lists of what may be a pair."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


# [fewest, most] of something that comes and goes.
Range = tuple[PositiveInt, PositiveInt]
SingleOrRange = BeforeValidator(_single)


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key, what was found and what is valid."""


class Section(BaseModel):
    """Base of every section: frozen, closed, documented by the docstrings below the fields."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )


def digest(value: Any) -> str:
    """Returns 16 hex digits that identify `value` (a section, or anything JSON can hold) by content."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    raise TypeError(f"{type(value).__name__} has no digest")
