"""Checks that settings fit each other, and the data; a misfit is an error of one line."""

from collections.abc import Iterator
from typing import Any

EVALUATIONS = {  # that each model has
    "mlp": ("running", "recalibrated", "shifted", "adapted", "shrunk", "folded", "ill", "cured"),
    "cnn": ("running", "own", "shifted", "weighed"),
    "lstm": ("running",),
}


def check(s: Any, where: str) -> None:
    """Raise ValueError if settings do not fit each other; `where` is named."""
    for problem in _problems(s):
        raise ValueError(f"{where}: {problem}")


def check_data(s: Any, data: Any) -> None:
    """Raise ValueError if the settings do not fit the data."""
    for problem in _problems_with_data(s, data):
        raise ValueError(f"data {s.data}: {problem}")


def _problems(s: Any) -> Iterator[str]:
    arms = list(s.arms)
    for key in ("arms", "learning_rates", "evaluations"):
        if len(set(getattr(s, key))) != len(getattr(s, key)):
            yield f"`{key}` must not hold a value twice; got {list(getattr(s, key))}."
    for whole, part, what in (("steps", "log_every", "chunks"), ("batch_size", "devices", "parts")):
        if getattr(s, whole) % getattr(s, part):
            got = f"{getattr(s, whole)} and {getattr(s, part)}"
            yield f"`{whole}` must be a multiple of `{part}`, to divide into equal {what}; got {got}."
    if s.domains == "inverted" and (s.model != "mlp" or s.batch_size % (2 * s.devices)):
        yield (
            '`domains = "inverted"` is for the MLP, and for an even number of examples on each device; got '
            f"{s.model} and batch size {s.batch_size} on {s.devices}."
        )
    if s.domains == "digits" and {"domains", "conditional"} & set(arms):
        yield f'`arms` domains and conditional need `domains = "inverted"`; got {arms}.'
    if s.evaluations != ("running",) and (arms != ["batch"] or s.devices != 1):
        yield (f"`evaluations` other than running are for the one arm batch on one device; got {arms} and {s.devices}.")
    if unfit := [e for e in s.evaluations if e not in EVALUATIONS[s.model]]:
        yield (
            f"`evaluations` must be among {', '.join(EVALUATIONS[s.model])} for model {s.model}; got "
            f"{', '.join(unfit)}. Own and weighed need images that have positions, those of the CNN; the others see "
            "the layers of the MLP one by one."
        )
    if "whiten" in arms and (s.model != "mlp" or any(n % s.whiten_size for n in s.widths)):
        got = f"{s.model}, {s.whiten_size} and {list(s.widths)}"
        yield f"arm whiten is for the MLP, and `whiten_size` must divide all `widths`; got {got}."
    if s.model == "lstm" and (len(s.widths) != 1 or not {"batch", "none"} >= set(arms)):
        yield (f"the LSTM has one number in `widths`, and the arms batch and none; got {list(s.widths)} and {arms}.")
    if "ghost" in arms and s.batch_size % s.ghost_batches:
        yield (
            "`batch_size` must be a multiple of `ghost_batches`, the number of parts of the whole batch; got "
            f"{s.batch_size} and {s.ghost_batches}."
        )
    # The same in all ways, so that a config means the same training in each of them.
    if "ghost" in arms and s.ghost_batches % s.devices and (s.parts > 1 or s.devices % s.ghost_batches):
        scope = "where statistics are per device or group" if s.parts > 1 else "or divide them"
        yield (
            "`ghost_batches` counts the parts of the whole batch, and must be a multiple of `devices` "
            f"{scope}; got {s.ghost_batches} and {s.devices}."
        )
    if s.devices % s.groups or (s.statistics == "groups" and s.groups == 1):
        yield (
            "`groups` must divide `devices`, and be 2 at least where `statistics` are theirs; got "
            f"{s.groups} and {s.devices}."
        )
    if s.way == "pmap" and s.groups > 1:
        yield f'`way = "pmap"` has one axis, and so one group; got {s.groups}. Take shard_map.'
    # All rates and seeds run under vmap, which makes a convolution of mapped kernels a grouped one; the reshape that
    # this takes is not supported on an Explicit mesh. A convolution of one network is.
    if s.model != "mlp" and s.way == "explicit" and s.devices > 1:
        yield f'`way = "explicit"` is for the MLP on several devices; got {s.model}. Take jit or shard_map.'
    if s.last_batch == "pad" and ("whiten" in arms or s.domains == "inverted"):
        got = f"{arms} and domains {s.domains}"
        yield f'`last_batch = "pad"` needs norms that take masks, and no pairs of images; got {got}. Take drop.'


def _problems_with_data(s: Any, data: Any) -> Iterator[str]:
    n, shape = len(data.train.labels), data.shape
    if s.batch_size > n:
        yield f"`batch_size` must not exceed the {n} training examples; got {s.batch_size}."
    if s.model == "cnn" and not (len(shape) == 3 or s.data == "digits"):
        yield f"model cnn is for images `[n, height, width, channels]`; got {shape or 'rows'}."
    if s.model == "lstm" and len(shape) < 2 and s.data != "digits":
        yield "model lstm is for sequences `[n, steps, features]` and images; got rows."
    if s.model != "lstm" and len(shape) == 2:
        yield f"sequences are for model lstm; got {s.model}."
    if s.data != "digits" and (s.domains == "inverted" or s.evaluations != ("running",)):
        yield f"`domains` and `evaluations` are for the digits; got {s.domains}, {s.evaluations}."
