"""All that is not the time of one layer, as rows: a measure, whose it is, and a value."""

from collections.abc import Iterator
from typing import Any

import jax

from experiments.benchmark import compiling, dispatch, errors, memory, training, whole_networks
from experiments.benchmark.layers import LAYERS, present
from experiments.benchmark.networks import NORMS
from experiments.benchmark.sizes import EPILOGUES, OURS, Case, Plan

Row = dict[str, Any]
ROWS = 65536  # of the inputs whose errors are measured
KEPT = (16384, 64)  # large, for what depends on that
SCANNED = (8, 16, 16, 32)


def rows(plan: Plan) -> Iterator[Row]:
    """Row after row; each part takes some seconds, the ResNet some minutes."""
    names = present(plan.contenders)
    yield from errors.by_offset(names, ROWS)
    yield from errors.masked()
    yield from _memory(plan, names)
    yield from dispatch.rows(names, plan.rounds)
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
            for name in names if epilogue in plan.epilogues else ():
                if name in LAYERS:
                    step = memory.one_layer(name, case)
                    for measure, value in (("temporary, layer", step.temporary), ("arrays moved", step.moved)):
                        yield {"measure": measure, "contender": name, **labels, "value": value}
        for name in (OURS, "flax", "flax, stable"):
            for measure, rematerialized in (("temporary, scan", False), ("temporary, scan, rematerialized", True)):
                value = memory.scanned(name, Case(SCANNED, dtype, "relu"), plan.scanned, rematerialized)
                yield {"measure": measure, "contender": name, "dtype": dtype, "value": value}


def _compile_times(plan: Plan) -> Iterator[Row]:
    for name, parts in compiling.seconds(plan.deep, plan.compilations).items():
        labels = {"layers": plan.deep}
        yield from training.compile_rows("compile time", name, parts["trace"], parts["compile"], labels)


def _training(plan: Plan) -> Iterator[Row]:
    problem = training.ON_CPU if jax.default_backend() == "cpu" else training.ON_GPU
    problem = problem._replace(stages=plan.stages)
    labels = {"problem": problem._asdict() | {"stages": list(problem.stages)}}
    steps = {name: training.training_step(name, problem) for name in NORMS}
    for name, step in steps.items():
        yield {"measure": "temporary, ResNet", "contender": name, **labels, "value": step.temporary_bytes}
    yield from training.step_rows("step time, ResNet", steps, plan.steps, labels)
