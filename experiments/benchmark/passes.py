"""Passes over memory, read off the optimized program: how many arrays of x's size its operations read and write.

Each operation of the entry computation, fused as the compiler fused it, reads its operands from memory and writes its
results there. What an operation does inside is not counted. See `floor` for how many there must be at least.
"""

import math
import re

# They move nothing: names for what is there already.
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (.*?)\s([\w-]+)\((.*)$")
_SHAPE = re.compile(r"\b[a-z]\w*\[([\d,]*)\]")


def moved(program: str, elements: int) -> int:
    """Arrays of `elements` entries that an optimized program reads and writes; each operation counts for itself."""
    count, sizes = 0, {}
    for line in _entry(program):
        found = _INSTRUCTION.match(line)
        if found is None:
            continue
        name, types, operation, rest = found.groups()
        sizes[name] = [_elements(shape) for shape in _SHAPE.findall(types)]
        if operation not in FREE:
            operands = set(re.findall(r"%([\w.-]+)", rest.split("), ")[0]))
            count += sizes[name].count(elements) + sum(sizes.get(o, []).count(elements) for o in operands)
    return count


def _entry(program: str) -> list[str]:
    """The lines of the entry computation."""
    lines = program.splitlines()
    began = next(i for i, line in enumerate(lines) if line.startswith("ENTRY"))
    return lines[began + 1 : lines.index("}", began)]


def _elements(shape: str) -> int:
    return math.prod(int(n) for n in shape.split(",") if n)
