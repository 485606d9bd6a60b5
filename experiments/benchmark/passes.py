"""Passes over memory, read off the optimized program: how many arrays of x's size its operations read and write.

Each operation of the entry computation, fused as the compiler fused it, reads its operands from memory and writes its
results there. What an operation does inside is not counted.
"""

import math
import re
from typing import NamedTuple

# They move nothing: names for what is there already. Nor does a loop by itself; our layer's is a second pass over
# x, made where the running mean is far from the batch's, which is rare.
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (.*?)\s([\w-]+)\((.*)$")
_SHAPE = re.compile(r"\b[a-z]\w*\[([\d,]*)\]")


class Operation(NamedTuple):
    """Return how many of the large arrays it reads and writes."""

    reads: int
    writes: int


def operations(program: str, elements: int) -> list[Operation]:
    """Those of an optimized program that read or write arrays of `elements` entries, in its order."""
    found, sizes = [], {}
    for line in _entry(program):
        instruction = _INSTRUCTION.match(line)
        if instruction is None:
            continue
        name, types, operation, rest = instruction.groups()
        sizes[name] = [_elements(shape) for shape in _SHAPE.findall(types)]
        if operation not in FREE:
            operands = set(re.findall(r"%([\w.-]+)", rest.split("), ")[0]))
            reads = sum(sizes.get(o, []).count(elements) for o in operands)
            found.append(Operation(reads, sizes[name].count(elements)))
    return [o for o in found if any(o)]


def moved(program: str, elements: int) -> int:
    """Arrays of `elements` entries that an optimized program reads and writes; each operation counts for itself."""
    return sum(map(sum, operations(program, elements)))


def _entry(program: str) -> list[str]:
    """Return the lines of the entry computation."""
    lines = program.splitlines()
    began = next(i for i, line in enumerate(lines) if line.startswith("ENTRY"))
    return lines[began + 1 : lines.index("}", began)]


def _elements(shape: str) -> int:
    return math.prod(int(n) for n in shape.split(",") if n)
