"""Every error that the code of this project raises or makes, with the literal parts of its message, read with `ast`.

A message is given as text in which `HOLE` stands for what depends on values. Names are followed to what the function
assigns to them, and calls to what functions of the same module return, so that a message put together from pieces is
found whole where it can be. One that still has no literal part is given as empty text.
"""

from __future__ import annotations

import ast
import builtins
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache

# Calls whose text is read by a user though they raise nothing.
TELLING = {"_refuse", "parser.error", "OneMessage"}
# What stands between literal parts: in the code a value, in a document an ellipsis or a word in capitals.
HOLE = "\0"
SPLIT = re.compile(rf"…|\b[A-Z][A-Z0-9_]*\b|{HOLE}")
DEEPEST = 4
Scope = ast.AST | None


@dataclass(frozen=True)
class Message:
    """One error of the code."""

    place: str
    line: int
    text: str


@cache
def normalised(text: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"[`'\"\\]", "", text))


@cache
def parts(text: str) -> tuple[str, ...]:
    """Returns the literal parts that say something, without the punctuation around them."""
    found = (part.strip(" :;,.()[]={}") for part in SPLIT.split(normalised(text)))
    return tuple(part for part in found if re.search("[a-z]{2}", part))


def num_literal(text: str) -> int:
    """Returns how many characters of a text are literal."""
    return sum(map(len, parts(text)))


def read_messages(sources: Mapping[str, str]) -> tuple[list[Message], list[str]]:
    """Returns the errors of these modules, by their paths, and every text that stands in them."""
    trees = {path: ast.parse(source) for path, source in sources.items()}
    errors = _own_errors(trees.values())
    modules = [_Module(path, tree, errors) for path, tree in trees.items()]
    messages = [message for module in modules for message in module.messages()]
    strings = {text for module in modules for text in module.strings()}
    return messages, sorted({message.text for message in messages} | strings)


class _Module:
    def __init__(self, path: str, tree: ast.Module, errors: set[str]) -> None:
        self.path, self.tree, self.errors = path, tree, errors
        self.functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}

    def strings(self) -> Iterator[str]:
        for node in ast.walk(self.tree):
            if isinstance(node, (ast.JoinedStr, ast.Constant)):
                yield from self.texts(node, None)

    def messages(self) -> Iterator[Message]:
        yield from self._visit(self.tree, (), None)

    def _visit(self, node: ast.AST, names: tuple[str, ...], scope: Scope) -> Iterator[Message]:
        for child in ast.iter_child_nodes(node):
            named = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
            if isinstance(child, ast.Call):
                yield from self._of_call(child, isinstance(node, ast.Raise) and child is node.exc, names, scope)
            yield from self._visit(child, (*names, child.name) if named else names, child if named else scope)

    def _of_call(self, call: ast.Call, is_raised: bool, names: tuple[str, ...], scope: Scope) -> Iterator[Message]:
        name = _dotted(call.func)
        if not (is_raised or name in TELLING or name.rsplit(".", 1)[-1] in self.errors):
            return
        # A method that makes the error gives it more than what it is told, and is looked at itself.
        by_method = name.startswith("self.")
        given = [one for one in call.args if not by_method or isinstance(one, (ast.Constant, ast.JoinedStr))]
        known = [text for one in given for text in self.texts(one, scope) if parts(text)]
        if by_method and not known:
            return
        # Of an error with a field and a message, the message; else each of several alternatives.
        for text in known if len(call.args) == 1 and known else [max(known or [""], key=len)]:
            yield Message(f"{self.path}:{'.'.join(names)}", call.lineno, text)

    def texts(self, node: Scope, scope: Scope, depth: int = DEEPEST) -> list[str]:
        """Returns what an expression can be as text."""
        if node is None or depth == 0:
            return []
        if isinstance(node, ast.Constant):
            return [normalised(node.value)] if isinstance(node.value, str) else []
        if isinstance(node, ast.JoinedStr):
            either = [self._alternatives(part, scope, depth) for part in node.values]
            return [normalised("".join(chosen)) for chosen in itertools.product(*either)]
        if isinstance(node, ast.BinOp):
            left, right = (self.texts(side, scope, depth) or [HOLE] for side in (node.left, node.right))
            return [left[0] + right[0]]
        inside, scope = self._inside(node, scope)
        return [text for one in inside for text in self.texts(one, scope, depth - 1)]

    def _alternatives(self, part: ast.expr, scope: Scope, depth: int) -> list[str]:
        """Returns what a piece of an f-string can be: its text, or one of those that a name or a choice stands for."""
        if isinstance(part, ast.Constant):
            return [part.value]
        value = part.value if isinstance(part, ast.FormattedValue) else None
        return (self.texts(value, scope, depth - 1) if isinstance(value, (ast.Name, ast.IfExp)) else []) or [HOLE]

    def _inside(self, node: ast.AST, scope: Scope) -> tuple[list[Scope], Scope]:
        """Returns the expressions that this one takes its text from, and the function they stand in."""
        if isinstance(node, ast.IfExp):
            return [node.body, node.orelse], scope
        if isinstance(node, (ast.List, ast.Tuple)):
            return list(node.elts), scope
        if isinstance(node, ast.Starred):
            return [node.value], scope
        if isinstance(node, (ast.GeneratorExp, ast.ListComp)):
            return [node.elt], scope
        if isinstance(node, ast.Name) and scope is not None:
            return list(_assigned(node.id, scope)), scope
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "join":
            return list(node.args), scope
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            function = self.functions.get(node.func.id)
            return [] if function is None else _returned(function), function
        return [], scope


def _assigned(name: str, scope: ast.AST) -> Iterator[ast.expr]:
    """Yields what a function puts into one of its variables."""
    for node in ast.walk(scope):
        if isinstance(node, ast.Assign):
            targets = [target.value if isinstance(target, ast.Subscript) else target for target in node.targets]
            if any(_dotted(target) == name for target in targets):
                yield node.value
        elif isinstance(node, (ast.AugAssign, ast.NamedExpr)):
            if _dotted(node.target) == name:
                yield node.value
        elif isinstance(node, ast.Call) and _dotted(node.func) == f"{name}.append":
            yield node.args[0]


def _returned(function: ast.AST) -> list[Scope]:
    return [node.value for node in ast.walk(function) if isinstance(node, ast.Return)]


def _dotted(node: ast.AST) -> str:
    """Returns ``a.b.c`` as text; of anything else the last names."""
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _own_errors(trees: Iterable[ast.Module]) -> set[str]:
    """Returns the names of the classes that are exceptions, through however many of our own."""
    bases = {
        node.name: {_dotted(base).rsplit(".", 1)[-1] for base in node.bases}
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    kinds = vars(builtins).items()
    errors = {name for name, kind in kinds if isinstance(kind, type) and issubclass(kind, BaseException)}
    while more := {name for name, above in bases.items() if above & errors} - errors:
        errors |= more
    return errors & set(bases)
