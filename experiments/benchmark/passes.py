"""Passes over memory, read off the optimized program: how many arrays of x's size its operations read and write.

Each operation of the entry computation, fused as the compiler fused it, reads its operands from memory and writes its
results there. What an operation does inside is not counted.
"""

from typing import NamedTuple

from experiments.benchmark import hlo


class Operation(NamedTuple):
    """The number of large arrays that an operation reads and writes."""

    reads: int
    writes: int


def operations(program: str, elements: int) -> list[Operation]:
    """Return the operations of an optimized program that read or write arrays of `elements` entries, in its order."""
    entry, computations = hlo.parse_program(program)
    large: dict[str, int] = {}
    found = []
    for i in computations[entry]:
        large[i.name] = [size for _, size in hlo.list_arrays(i.types)].count(elements)
        if i.operation not in hlo.FREE:  # an operand that is named twice is read once
            found.append(Operation(sum(large.get(o, 0) for o in set(i.operands)), large[i.name]))
    return [o for o in found if any(o)]


def moved(program: str, elements: int) -> int:
    """Return how many arrays of `elements` entries a program reads and writes; each operation counts for itself."""
    return sum(map(sum, operations(program, elements)))
