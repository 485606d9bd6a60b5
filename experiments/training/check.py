"""Which settings fit each other, and the data; what does not is an error of one line."""

from typing import Any

EVALUATIONS = {  # that each model has
    "mlp": ("running", "recalibrated", "shifted", "adapted", "shrunk", "folded", "ill", "cured"),
    "cnn": ("running", "own", "shifted", "weighed"),
    "lstm": ("running",),
}


def check(s: Any, where: str) -> None:
    """Check that settings are consistent; `where` is named in errors.

    Raises:
        ValueError: they are not.
    """
    for key in ("arms", "learning_rates", "evaluations"):
        if len(set(getattr(s, key))) != len(getattr(s, key)):
            raise ValueError(f"{where}: `{key}` must not hold a value twice; got {list(getattr(s, key))}.")
    for whole, part, what in (("steps", "log_every", "chunks"), ("batch_size", "devices", "parts")):
        if getattr(s, whole) % getattr(s, part):
            raise ValueError(
                f"{where}: `{whole}` must be a multiple of `{part}`, to divide into equal {what}; "
                f"got {getattr(s, whole)} and {getattr(s, part)}."
            )
    if s.domains == "inverted" and (s.model != "mlp" or s.batch_size % (2 * s.devices)):
        raise ValueError(
            f'{where}: `domains = "inverted"` is for the MLP, and for an even number of examples on each device; got '
            f"{s.model} and batch size {s.batch_size} on {s.devices}."
        )
    if s.domains == "digits" and {"domains", "conditional"} & set(s.arms):
        raise ValueError(f'{where}: `arms` domains and conditional need `domains = "inverted"`; got {list(s.arms)}.')
    if s.evaluations != ("running",) and (s.arms != ("batch",) or s.devices != 1):
        raise ValueError(
            f"{where}: `evaluations` other than running are for the one arm batch on one device; got {list(s.arms)} "
            f"and {s.devices}."
        )
    if unfit := [e for e in s.evaluations if e not in EVALUATIONS[s.model]]:
        raise ValueError(
            f"{where}: `evaluations` must be among {', '.join(EVALUATIONS[s.model])} for model {s.model}; got "
            f"{', '.join(unfit)}. Own and weighed need images that have positions, those of the CNN; the others see "
            "the layers of the MLP one by one."
        )
    if "whiten" in s.arms and (s.model != "mlp" or any(n % s.whiten_size for n in s.widths)):
        raise ValueError(
            f"{where}: arm whiten is for the MLP, and `whiten_size` must divide all `widths`; got {s.model}, "
            f"{s.whiten_size} and {list(s.widths)}."
        )
    if s.model == "lstm" and (len(s.widths) != 1 or not {"batch", "none"} >= set(s.arms)):
        raise ValueError(
            f"{where}: the LSTM has one number in `widths`, and the arms batch and none; got {list(s.widths)} and "
            f"{list(s.arms)}."
        )
    if "ghost" in s.arms:
        _check_ghosts(s, where)
    _check_devices(s, where)


def _check_ghosts(s: Any, where: str) -> None:
    if s.batch_size % s.ghost_batches:
        raise ValueError(
            f"{where}: `batch_size` must be a multiple of `ghost_batches`, the number of parts of the whole batch; got "
            f"{s.batch_size} and {s.ghost_batches}."
        )
    # The same in all ways, so that a config means the same training in each of them.
    if s.ghost_batches % s.devices and (s.parts > 1 or s.devices % s.ghost_batches):
        raise ValueError(
            f"{where}: `ghost_batches` counts the parts of the whole batch, and must be a multiple of `devices`"
            f"{' where statistics are per device or group' if s.parts > 1 else ' or divide them'}; got "
            f"{s.ghost_batches} and {s.devices}."
        )


def _check_devices(s: Any, where: str) -> None:
    if s.devices % s.groups or (s.statistics == "groups" and s.groups == 1):
        raise ValueError(
            f"{where}: `groups` must divide `devices`, and be 2 at least where `statistics` are theirs; got {s.groups} "
            f"and {s.devices}."
        )
    if s.way == "pmap" and s.groups > 1:
        raise ValueError(f'{where}: `way = "pmap"` has one axis, and so one group; got {s.groups}. Take shard_map.')
    # All rates and seeds run under vmap, which makes a convolution of mapped kernels a grouped one; the reshape that this
    # takes is not supported on an Explicit mesh. A convolution of one network is.
    if s.model != "mlp" and s.way == "explicit" and s.devices > 1:
        raise ValueError(
            f'{where}: `way = "explicit"` is for the MLP on several devices; got {s.model}. Take jit or shard_map.'
        )
    if s.last_batch == "pad" and ("whiten" in s.arms or s.domains == "inverted"):
        raise ValueError(
            f'{where}: `last_batch = "pad"` needs norms that take masks, and no pairs of images; got {list(s.arms)} '
            f"and domains {s.domains}. Take drop."
        )


def check_data(s: Any, data: Any) -> None:
    """Check that the settings fit the data.

    Raises:
        ValueError: they do not.
    """
    n, shape, where = len(data.train.labels), data.shape, f"data {s.data}"
    if s.batch_size > n:
        raise ValueError(f"{where}: `batch_size` must not exceed the {n} training examples; got {s.batch_size}.")
    if s.model == "cnn" and not (len(shape) == 3 or s.data == "digits"):
        raise ValueError(f"{where}: model cnn is for images `[n, height, width, channels]`; got {shape or 'rows'}.")
    if s.model == "lstm" and len(shape) < 2 and s.data != "digits":
        raise ValueError(f"{where}: model lstm is for sequences `[n, steps, features]` and images; got rows.")
    if s.model != "lstm" and len(shape) == 2:
        raise ValueError(f"{where}: sequences are for model lstm; got {s.model}.")
    if s.data != "digits" and (s.domains == "inverted" or s.evaluations != ("running",)):
        raise ValueError(f"{where}: `domains` and `evaluations` are for the digits; got {s.domains}, {s.evaluations}.")
