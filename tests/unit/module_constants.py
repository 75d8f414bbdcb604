"""Constants of modules that would load torch or Ray, read from their text."""

from __future__ import annotations

import ast
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def constant(path: str, name: str):
    """The literal that a module assigns to a name at its top level."""
    for node in ast.parse((REPOSITORY / path).read_text(encoding="utf-8")).body:
        target = (
            node.target
            if isinstance(node, ast.AnnAssign)
            else node.targets[0]
            if isinstance(node, ast.Assign)
            else None
        )
        if isinstance(target, ast.Name) and target.id == name:
            return ast.literal_eval(node.value)
        if isinstance(target, ast.Tuple) and name in (names := [one.id for one in target.elts]):
            return ast.literal_eval(node.value)[names.index(name)]
    raise AssertionError(f"{path} has no {name}")
