"""The text of an optimized program: its computations and their instructions."""

import math
import re
from typing import NamedTuple

# They move nothing: names for what is there already. Nor does a loop by itself; our layer's is a second pass over
# x, made where the running mean is far from the batch's, which is rare.
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while")
COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}", re.S | re.M)
# The type may be a long tuple with comments in it.
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\b(?:branch_computations|true_computation|false_computation|body)=(\{[^}]*\}|\S+)")


class Instruction(NamedTuple):
    """An instruction.

    Attributes:
        name: of its result.
        types: of its results, as text.
        operation: by name.
        operands: their names.
        inside: the text in the parentheses, with a parameter's number.
        called: the computation that it calls or is fused of.
        branches: the computations that a branch or a loop may run.
    """

    name: str
    types: str
    operation: str
    operands: tuple[str, ...]
    inside: str
    called: str | None
    branches: tuple[str, ...]


def parse_program(text: str) -> tuple[str, dict[str, list[Instruction]]]:
    """Return the entry's name, and each computation's instructions."""
    entry, computations = "", {}
    for first, name, body in _COMPUTATION.findall(text):
        entry = name if first else entry
        computations[name] = [i for i in map(_parse, body.splitlines()) if i is not None]
    return entry, computations


def list_arrays(types: str) -> list[tuple[str, int]]:
    """Return the dtype and the number of elements of each array that a type names."""
    return [(dtype, math.prod(int(n) for n in shape.split(",") if n)) for dtype, shape in _SHAPE.findall(types)]


def _parse(line: str) -> Instruction | None:
    found = _INSTRUCTION.match(line)
    if found is None:
        return None
    name, types, operation, rest = found.groups()
    depth, end = 1, 0
    while depth and end < len(rest):
        depth += (rest[end] == "(") - (rest[end] == ")")
        end += 1
    inside, attributes = rest[: end - 1], rest[end:]
    called = _CALLED.search(attributes)
    branches = tuple(re.findall(r"[\w.\-]+", " ".join(_BRANCHES.findall(attributes))))
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(name, types, operation, operands, inside, called and called[1], branches)
