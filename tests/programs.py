"""Reading of XLA's optimized programs, for the tests marked `compiler`."""

import re
from collections import Counter

OPERATIONS = ("all-reduce", "all-gather", "collective-permute", "all-to-all", "reduce-scatter")


def count_collectives(text: str) -> Counter[str]:
    """Count each collective operation in a program, synchronous or started."""
    # An instruction is `name = type operation(operands)`; the type may be a long tuple with comments in it.
    return Counter(re.findall(rf" = .*?\s({'|'.join(OPERATIONS)})(?:-start)?\(", text))


def remove_loops(text: str) -> str:
    """Remove the bodies of loops from a program: the second pass over x is in one, and rarely made."""
    names = set(re.findall(r"(?:body|condition)=(%[\w.\-]+)", text))
    computations = re.split(r"\n(?=%|ENTRY)", text)
    return "\n".join(c for c in computations if c.split(" ")[0] not in names)
