"""All that is not the time of one layer, as rows: a measure, whose it is, and a value."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from experiments.benchmark import compiling, dispatch, errors, folding, memory, training, whole_networks
from experiments.benchmark.clock import interleaved, quartiles
from experiments.benchmark.layers import LAYERS, present
from experiments.benchmark.networks import NORMS
from experiments.benchmark.sizes import EPILOGUES, NOBODYS, OURS, Case, Plan

Row = dict[str, Any]
ROWS = 65536  # of the inputs whose errors are measured
KEPT = (16384, 64)  # large, for what depends on that
SCANNED = (8, 16, 16, 32)


def rows(plan: Plan) -> Iterator[Row]:
    """Row after row; each part takes some seconds, the ResNet some minutes."""
    # In two dimensions features are last anyway: there PyTorch has one layout. And what is nobody's is only timed.
    flat = [name for name in present(plan.contenders) if name not in ("torch", *NOBODYS)]
    yield from errors.by_offset(flat, ROWS)
    yield from errors.masked()
    yield from _memory(plan, flat)
    yield from dispatch.rows(flat, plan.rounds)
    for dtype in plan.dtypes:
        yield from folding.rows(dtype, plan.rounds)
    yield from _compile_times(plan)
    yield from _training(plan)
    problem = whole_networks.RESNET_20 if plan.name == "full" else whole_networks.SMALLEST
    yield from whole_networks.rows(problem, plan.rounds, plan.compilations)


def _memory(plan: Plan, names: list[str]) -> Iterator[Row]:
    for dtype in plan.dtypes:
        for epilogue in EPILOGUES:
            case = Case(KEPT, dtype, epilogue)
            labels = {"dtype": dtype, "epilogue": epilogue}
            for name in names:
                yield {"measure": "kept", "contender": name, **labels, "value": memory.kept(name, case)}
            for name in (*names, *NOBODYS) if epilogue in plan.epilogues else ():
                if name in LAYERS:
                    step = memory.one_layer(name, case)
                    shown = ", ".join(f"{o.reads} → {o.writes}" for o in step.operations)
                    found = {"temporary, layer": step.temporary, "arrays moved": step.moved, "operations": shown}
                    for measure, value in found.items():
                        yield {"measure": measure, "contender": name, **labels, "value": value}
        for name in (OURS, "flax", "flax, stable"):
            for measure, rematerialized in (("temporary, scan", False), ("temporary, scan, rematerialized", True)):
                value = memory.scanned(name, Case(SCANNED, dtype, "relu"), plan.scanned, rematerialized)
                yield {"measure": measure, "contender": name, "dtype": dtype, "value": value}


def _compile_times(plan: Plan) -> Iterator[Row]:
    seconds = compiling.seconds(plan.deep, plan.compilations)
    for name, parts in seconds.items():
        for part, values in (*parts.items(), ("trace + compile", parts["trace"] + parts["compile"])):
            labels = {"contender": name, "part": part, "layers": plan.deep}
            yield {"measure": "compile time", **labels, "value": float(np.median(values)), **quartiles(values)}


def _training(plan: Plan) -> Iterator[Row]:
    problem = training.ON_CPU if jax.default_backend() == "cpu" else training.ON_GPU
    problem = problem._replace(stages=plan.stages)
    labels = {"problem": problem._asdict() | {"stages": list(problem.stages)}}
    steps = {name: training.training_step(name, problem) for name in NORMS}
    for name, step in steps.items():
        yield {"measure": "temporary, ResNet", "contender": name, **labels, "value": step.temporary_bytes}
    sampled = interleaved({name: training.call(step) for name, step in steps.items()}, plan.steps)
    for name, own in sampled.items():
        row = {"measure": "step time, ResNet", "contender": name, **labels, **quartiles(own.seconds)}
        ratio = quartiles(sampled[OURS].seconds / own.seconds)
        yield row | {"value": row["median"], "ours_to_theirs": ratio}
