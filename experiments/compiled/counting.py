"""Counts from the text of an optimized program: bytes moved, and collectives."""

from collections.abc import Sequence
from typing import NamedTuple

from experiments.benchmark import hlo
from experiments.benchmark.hlo import Instruction

# An asynchronous operation reads its operands where it is begun, and has its result where it is done.
BEGUN, DONE = "-start", "-done"
FREE = (*hlo.FREE, "after-all", "partition-id")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s64": 8, "u64": 8, "f64": 8, "c64": 8}


class Sent(NamedTuple):
    """The number of collectives of a kind in a program, the bytes of all, and those of the largest."""

    number: int
    bytes: int
    largest: int


def count_bytes(types: str) -> int:
    """Return the bytes of the arrays that a type names."""
    return sum(BYTES.get(d, 1 if d.startswith("f8") else 4) * elements for d, elements in hlo.list_arrays(types))


def has_loop(text: str) -> bool:
    """Return whether a program decides at run time what it computes."""
    return any(i.operation in ("conditional", "while") for body in hlo.parse_program(text)[1].values() for i in body)


def count_moved(text: str) -> int:
    """Return the bytes that the operations of the entry computation read and write.

    What an operation does inside, fused as the compiler fused it, stays in registers. Of an operand that a fusion only
    slices it reads the slices.

    Raises:
        ValueError: the program has a loop or a branch, of which no count can be read off.
    """
    entry, computations = hlo.parse_program(text)
    return _count(computations[entry], computations)


def count_collectives(text: str) -> dict[str, Sent]:
    """Return what a program sends by each kind of collective; one in a loop counts like any other."""
    found: dict[str, Sent] = {}
    for body in hlo.parse_program(text)[1].values():
        for i in body:
            kind = i.operation.removesuffix(DONE)  # what is begun names operands among its results
            if kind in hlo.COLLECTIVES:
                size, old = count_bytes(i.types), found.get(kind, Sent(0, 0, 0))
                found[kind] = Sent(old.number + 1, old.bytes + size, max(old.largest, size))
    return found


def _count(body: Sequence[Instruction], computations: dict[str, list[Instruction]]) -> int:
    types, total = {i.name: i.types for i in body}, 0
    for i in body:
        if i.operation in ("while", "conditional"):
            raise ValueError(f"the bytes that a {i.operation} moves cannot be read off the program")
        if i.operation == "call" and i.called:
            total += _count(computations[i.called], computations)
        elif i.operation not in FREE:
            sliced = _slices(computations[i.called]) if i.operation == "fusion" and i.called else {}
            reads = [sliced.get(n, count_bytes(types.get(o, ""))) for n, o in enumerate(i.operands)]
            total += 0 if i.operation.endswith(DONE) else sum(reads)
            total += 0 if i.operation.endswith(BEGUN) else count_bytes(i.types)
    return total


def _slices(body: Sequence[Instruction]) -> dict[int, int]:
    """Return the bytes read of the parameters that a fused computation uses in nothing but slices, by their number."""
    source: dict[str, int] = {}  # the parameter of which a name is another view
    uses: dict[int, list[int | None]] = {}
    for i in body:
        if i.operation == "parameter":
            source[i.name] = int(i.inside)
        for number in {source[o] for o in i.operands if o in source}:
            if i.operation == "bitcast":
                source[i.name] = number
            else:
                uses.setdefault(number, []).append(count_bytes(i.types) if i.operation == "slice" else None)
    return {number: sum(u for u in used if u) for number, used in uses.items() if None not in used}
