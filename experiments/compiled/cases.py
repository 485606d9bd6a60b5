"""The cases: programs, contenders, and the ways and layouts in which they are compiled."""

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

from experiments.compiled.targets import TARGETS

# The layer by itself; four times convolution 3x3, layer and ReLU; ResNet-50. A training step each.
ALONE, NET, RESNET = "alone", "net", "ResNet-50"
NET_LAYERS = 4
OURS, FLAX, STABLE, NONE = "jaxbn", "flax", "flax, stable", "none"
# In ResNet-50: only the layer's class is another, ReLU outside; and with the ReLUs that follow a layer inside it.
SWAPPED, INSIDE = "jaxbn, swapped", "jaxbn, inside"
# `pmap` is not among them: it is deprecated, and compiles to what `shard_map` does.
JIT, EXPLICIT, SHARD_MAP = WAYS = ("jit", "jit, Explicit", "shard_map")
# What the mesh cuts: the batch on a mesh of one axis; else on a mesh of two the batch over both, or over the first and
# over the second the features or the rows of the images.
BATCH, BOTH, FEATURES, ROWS = LAYOUTS = ("batch", "batch over both axes", "features over one", "rows over one")
ODD = ("h100-127", "v5p-127")
ENDS = ("h100-8", "h100-256", "h100-1024", "v5e-4", "v5e-256", "v5p-4096")


class Case(NamedTuple):
    """One program of one contender for one target."""

    program: str
    target: str
    way: str
    layout: str
    epilogue: str
    dtype: str
    contender: str

    @property
    def ours(self) -> bool:
        """Return whether the layer is jaxbn's."""
        return self.contender.startswith(OURS)

    @property
    def kind(self) -> str:
        """Return the kind of target."""
        return TARGETS[self.target].kind

    @property
    def name(self) -> str:
        """Return the fields in words."""
        return ", ".join(v for v in self if v != BATCH)


def list_cases(kinds: tuple[str, ...] = ("tpu", "gpu"), small: bool = False, only: str = "") -> list[Case]:
    """Return the cases on targets of `kinds`: all, or the small part that is checked with every change.

    `only` is part of the names of those that are wanted.

    Raises:
        ValueError: no name has it.
    """
    listed = [case for case in (_small() if small else _all()) if case.kind in kinds]
    chosen = [case for case in listed if only in case.name]
    if not chosen:
        raise ValueError(f"`only` must be part of a case's name, such as {listed[0].name!r}; got {only!r}.")
    return chosen


def _all() -> Iterator[Case]:
    even = [t for t in TARGETS if t not in ODD]
    for target in even:
        yield from _cases(ALONE, target, JIT, "bfloat16")
        yield from _cases(NET, target, JIT, "bfloat16", contenders=(NONE, OURS, FLAX, STABLE))
    # The other ways and the other dtype on the fewest and the most of a kind: between them nothing changes.
    for target, (way, dtype) in product(ENDS, ((JIT, "float32"), (EXPLICIT, "bfloat16"), (SHARD_MAP, "bfloat16"))):
        yield from _cases(ALONE, target, way, dtype)
        yield from _cases(NET, target, way, dtype, contenders=(NONE, OURS, FLAX, STABLE))
    for target in ENDS:
        yield from _cases(ALONE, target, JIT, "bfloat16", epilogue="none")
    for target in ODD:
        yield from _cases(ALONE, target, JIT, "bfloat16", contenders=(OURS, FLAX))
    for target, way, layout in product(("h100-64", "v5e-64"), (JIT, EXPLICIT), LAYOUTS[1:]):
        yield from _cases(ALONE, target, way, "bfloat16", layout, contenders=(OURS, FLAX))
    for target in ("h100-8", "h100-256", "v5e-4", "v5e-256"):
        yield from _cases(RESNET, target, JIT, "bfloat16", contenders=(SWAPPED, INSIDE, FLAX))


def _small() -> Iterator[Case]:
    for target, way in product(("v5e-4", "v5e-256", "h100-8", "h100-256"), (JIT, SHARD_MAP)):
        yield from _cases(NET, target, way, "bfloat16", contenders=(NONE, OURS, FLAX))
    for way in (JIT, SHARD_MAP):
        yield from _cases(ALONE, "v5p-4096", way, "bfloat16", contenders=(OURS, FLAX))


def _cases(
    program: str,
    target: str,
    way: str,
    dtype: str,
    layout: str = BATCH,
    *,
    epilogue: str = "ReLU",
    contenders: tuple[str, ...] = (OURS, FLAX, STABLE),
) -> Iterator[Case]:
    for contender in contenders:
        yield Case(program, target, way, layout, epilogue, dtype, contender)
