"""Other ways to the same layer, compiled for a GPU and a TPU: what the choices of the core are worth.

    python -m experiments.compiled.tried {tpu,gpu}

Each way is the layer as it is with one choice made otherwise. Writes `docs/compiled/tried.json` and `tried.md`; the two
kinds of target need environments of their own, as `make compiled` makes them.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

from experiments.compiled.cases import ALONE, BATCH, FLAX, JIT, NET, OURS, Case
from experiments.compiled.command import DOCS, replace
from experiments.compiled.measure import Record, measure_case
from experiments.compiled.targets import set_environment

TARGET = {"gpu": "h100-8", "tpu": "v5e-4"}


@contextmanager
def choose_platform(name: str | None) -> Iterator[None]:
    """Take the form of one platform for all; None for the default's."""
    from jax import lax

    def chosen(*args: Any, default: Callable[..., Any], **branches: Callable[..., Any]) -> Any:
        return branches.get(name or "", default)(*args)

    with mock.patch.object(lax, "platform_dependent", chosen):
        yield


@contextmanager
def take_two_passes() -> Iterator[None]:
    """Take the mean of all of x as pivot."""
    from jaxbn._core import batch_moments

    with choose_platform("cuda"), mock.patch.object(batch_moments, "_sample_part", lambda r, x: x):
        yield


@contextmanager
def sum_each() -> Iterator[None]:
    """Take two sums in the backward pass, not one of pairs."""
    from jaxbn._core import normalize_batch

    with mock.patch.object(normalize_batch, "choose_by_platform", lambda *args, default, **others: default(*args)):
        yield


@contextmanager
def differentiate_formula() -> Iterator[None]:
    """Leave the derivative to JAX: of the moments by their rule, of the rest operation by operation, recomputed."""
    import jax

    from jaxbn._core import batch_norm, normalize

    def by_formula(r, epsilon, epilogue, x, mask, m, train, scale, bias):
        @partial(jax.checkpoint, prevent_cse=False)
        def f(x, m, scale, bias):
            inverse = normalize.inverse_std(m.var, epsilon)
            d = (x.astype(m.mean.dtype) - m.mean) - m.tail
            return epilogue(normalize.apply_affine(d, inverse if scale is None else scale * inverse, bias))

        return f(x, m, scale, bias)

    with mock.patch.object(batch_norm, "normalize_by_batch", by_formula):
        yield


WAYS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "as it is": nullcontext,
    "pivot: the running mean, and a second pass in a branch": partial(choose_platform, None),
    "pivot: the mean of a part of x": partial(choose_platform, "cuda"),
    "pivot: the mean of all of x": take_two_passes,
    "backward: two sums": sum_each,
    "backward: JAX's own derivative of the formula, recomputed": differentiate_formula,
}


def measure_ways(kind: str) -> dict[str, dict[str, Record]]:
    """Return the records of every way, and of flax, by program."""
    cases = {p: Case(p, TARGET[kind], JIT, BATCH, "ReLU", "bfloat16", OURS) for p in (ALONE, NET)}
    found = {FLAX: {p: measure_case(case._replace(contender=FLAX)) for p, case in cases.items()}}
    for name, way in WAYS.items():
        with way():
            found[name] = {p: measure_case(case) for p, case in cases.items()}
        print(name, {p: round(r["moved_bytes"] / r["array_bytes"], 2) for p, r in found[name].items()}, flush=True)
    return found


def write_table(found: dict[str, dict[str, dict[str, Record]]]) -> str:
    """Return the records as a page: arrays moved and temporaries over x, and all-reduces."""
    head = [f"{TARGET[kind]}, {program}" for kind in found for program in (ALONE, NET)]
    lines = [
        "# Other ways to the layer, compiled",
        "",
        "Bytes that a training step moves over those of x, temporaries over x, and all-reduces; bfloat16 with ReLU,",
        "under sharded `jit`. `alone`: one layer; `net`: four times convolution 3x3, layer, ReLU. Where a branch for a",
        "rare second pass is in the program, the bytes are those without it. By",
        "`python -m experiments.compiled.tried {tpu,gpu}`.",
        "",
        "| way | " + " | ".join(head) + " |",
        "|---" * (len(head) + 1) + "|",
    ]
    for name in next(iter(found.values())):
        cells = []
        for kind in found:
            for program in (ALONE, NET):
                r = found[kind][name][program]
                sums = sum(sent["number"] for sent in r["collectives"].values())
                x = r["array_bytes"]
                cells.append(f"{r['moved_bytes'] / x:.2f}, {r['temporary_bytes'] / x:.2f}, {sums}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(kind: str) -> None:
    """Measure one kind of target, and write both records and the page."""
    set_environment(kind)
    path = DOCS / "tried.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found[kind] = measure_ways(kind)
    DOCS.mkdir(parents=True, exist_ok=True)
    replace(path, json.dumps(found, indent=1) + "\n")
    replace(DOCS / "tried.md", write_table(found))


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in TARGET:
        sys.exit("usage: python -m experiments.compiled.tried {tpu,gpu}")
    main(sys.argv[1])
