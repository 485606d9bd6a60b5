"""Numbers and requests of a measurement as JSON has them."""

import dataclasses
import math
from typing import Any

import numpy as np

from experiments.training import config


def plain(value: Any) -> Any:
    """Return `value` as JSON has it: lists, and numbers of six digits; infinities and NaN as words."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, bool | str | None):
        return value
    if hasattr(value, "ndim") and value.ndim:
        return plain(np.asarray(value).tolist())
    number = value.item() if hasattr(value, "item") else value
    if isinstance(number, float):
        return float(f"{number:.6g}") if math.isfinite(number) else str(number)
    return number


def numbers(value: Any) -> Any:
    """Return the numbers that `plain` made words of."""
    if isinstance(value, dict):
        return {k: numbers(v) for k, v in value.items()}
    if isinstance(value, list):
        return [numbers(v) for v in value]
    return float(value) if value in ("inf", "-inf", "nan") else value


def differing(asked: Any, given: config.Settings) -> Any:
    """Return a part's request for JSON; of settings only the differences from those `given` by the config."""
    if isinstance(asked, config.Settings):
        own, start = dataclasses.asdict(asked), dataclasses.asdict(given)
        return {key: differing(value, given) for key, value in own.items() if value != start[key]}
    if isinstance(asked, dict):
        return {str(key): differing(value, given) for key, value in asked.items()}
    if hasattr(asked, "_asdict"):
        return differing(asked._asdict(), given)
    if isinstance(asked, list | tuple):
        return [differing(value, given) for value in asked]
    return plain(asked) if isinstance(asked, bool | int | float | str | None) else repr(asked)
