"""Arithmetic that shows itself: named quantities with units, and rules that make further ones of them.

A rule is an expression of names. It is evaluated as it is printed, with the numbers in place of the names, so what is
shown is what was computed. Units are text such as ``FLOP / s / gpu``; `dimension` reads them, and a test evaluates
every rule over dimensions instead of numbers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from types import CodeType
from typing import Any, Literal

Kind = Literal["asked", "measured", "assumed", "data sheet", "definition", "computed"]
# What a unit is made of; every other word in a unit (users, rows, tokens) only says what is counted.
BASE_UNITS = frozenset({"s", "h", "ms", "day", "month", "B", "GB", "FLOP", "USD", "gpu", "core", "worker"})
FUNCTIONS: dict[str, Any] = {"ceil": math.ceil, "floor": math.floor, "max": max, "min": min}
_WORD = re.compile(r"[a-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Quantity:
    """A number, its unit, and where it comes from.

    Attributes:
        name: In expressions.
        value: The number.
        unit: Such as ``rows / s``; ``1`` for a share.
        kind: asked: a flag; measured: a result of benchmarks/; assumed: with its reason; data sheet: of a maker.
        source: File, figure and date, or the reason.
    """

    name: str
    value: float
    unit: str
    kind: Kind
    source: str


@dataclass(frozen=True)
class Rule:
    """How a quantity follows from others.

    Attributes:
        name: Of the result.
        unit: Of the result.
        expression: Python arithmetic over names, numbers and `FUNCTIONS`.
        meaning: What it is, for people.
    """

    name: str
    unit: str
    expression: str
    meaning: str

    @property
    def names(self) -> tuple[str, ...]:
        """The quantities that it reads, in order, each once."""
        return tuple(word for word in dict.fromkeys(_WORD.findall(self.expression)) if word not in FUNCTIONS)


@dataclass(frozen=True)
class Line:
    """One step of the arithmetic.

    Attributes:
        rule: What was computed.
        formula: The expression with the numbers in it.
        value: The result.
    """

    rule: Rule
    formula: str
    value: float

    @property
    def text(self) -> str:
        """The result with its unit."""
        return f"{number(self.value)} {self.rule.unit}".removesuffix(" 1")


class Ledger:
    """Quantities by name, and the lines that made some of them.

    Args:
        quantities: What is given.
    """

    def __init__(self, quantities: Iterable[Quantity]) -> None:
        self.quantities: dict[str, Quantity] = {}
        self.lines: list[Line] = []
        for quantity in quantities:
            assert quantity.name not in self.quantities, quantity.name
            self.quantities[quantity.name] = quantity

    def __getitem__(self, name: str) -> float:
        """Returns the number of a quantity."""
        return self.quantities[name].value

    def compute(self, rules: Iterable[Rule]) -> list[Line]:
        """Evaluates rules in order; each may read the results of those before.

        Returns:
            The new lines.
        """
        new = []
        for rule in rules:
            assert rule.name not in self.quantities, rule.name
            value = float(evaluate(rule.expression, {name: self[name] for name in rule.names}))
            self.quantities[rule.name] = Quantity(rule.name, value, rule.unit, "computed", rule.expression)
            new.append(Line(rule, self._formula(rule), value))
        self.lines += new
        return new

    def costs(self) -> list[Quantity]:
        """Returns what the lines read and did not compute themselves, in order of first use."""
        names = dict.fromkeys(name for line in self.lines for name in line.rule.names)
        return [self.quantities[name] for name in names if self.quantities[name].kind != "computed"]

    def _formula(self, rule: Rule) -> str:
        def substitute(found: re.Match[str]) -> str:
            return found[0] if found[0] in FUNCTIONS else number(self[found[0]])

        return readable(_WORD.sub(substitute, rule.expression))


def evaluate(expression: str, values: Mapping[str, Any], functions: Mapping[str, Any] = FUNCTIONS) -> Any:
    """Returns the value of a rule's expression over any kind of number; expressions are this project's own."""
    return eval(_compiled(expression), {"__builtins__": {}, **functions}, dict(values))


@cache
def _compiled(expression: str) -> CodeType:
    return compile(expression, "<rule>", "eval")


def readable(expression: str) -> str:
    """Returns an expression as people write it: x for *."""
    return expression.replace(" * ", " x ")


def number(value: float) -> str:
    """Returns a number with five digits, as Python reads it too: 0.5, 208.4, 20000, 5e10."""
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e7:
        digits, exponent = f"{value:.4e}".split("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"
    if value == int(value):
        return str(int(value))
    text = f"{value:.{max(0, 4 - math.floor(math.log10(abs(value))))}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


@dataclass(frozen=True)
class Dimension:
    """Exponents of base units; counts are pure numbers. Behaves as a number in an expression.

    Attributes:
        exponents: Of each base unit that does not cancel out, sorted.
    """

    exponents: tuple[tuple[str, int], ...] = ()

    def __mul__(self, other: Any) -> Dimension:
        return self._combined(other, 1)

    def __truediv__(self, other: Any) -> Dimension:
        return self._combined(other, -1)

    def __rmul__(self, other: Any) -> Dimension:
        return _dimension_of(other) * self

    def __rtruediv__(self, other: Any) -> Dimension:
        return _dimension_of(other) / self

    def __add__(self, other: Any) -> Dimension:
        if _dimension_of(other) != self:
            raise ValueError(f"{self} and {_dimension_of(other)} cannot be added")
        return self

    __radd__ = __sub__ = __rsub__ = __add__

    def _combined(self, other: Any, sign: int) -> Dimension:
        sums = dict(self.exponents)
        for unit, power in _dimension_of(other).exponents:
            sums[unit] = sums.get(unit, 0) + sign * power
        return Dimension(tuple(sorted((unit, power) for unit, power in sums.items() if power)))


def _dimension_of(value: Any) -> Dimension:
    return value if isinstance(value, Dimension) else Dimension()


def dimension(unit: str) -> Dimension:
    """Reads a unit: words separated by blanks multiply, those after a slash divide."""
    found = Dimension()
    for place, part in enumerate(unit.split("/")):
        for word in part.split():
            if word in BASE_UNITS:
                one = Dimension(((word, 1),))
                found = found / one if place else found * one
    return found


def same_dimension(first: Any, *others: Any) -> Dimension:
    """Stands for max and min over dimensions: all must agree."""
    for other in others:
        _ = _dimension_of(first) + other
    return _dimension_of(first)
