"""From estimates and criteria to a verdict. The rule is fixed; nobody looks at a result and then decides."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from experiments.claims.intervals import Estimate
from experiments.training.config import STRICT

Verdict = Literal["supported", "not supported", "contested", "inconclusive"]


@dataclass(frozen=True, config=STRICT)
class Criterion:
    """What was said before the run about one number.

    Attributes:
        key: which of the claim's estimates.
        text: what the number is, in words.
        at_least, at_most: what it has to be; both for a range, neither for a number that is only reported.
        decides: whether the verdict on the claim depends on it.
    """

    key: Annotated[str, Field(min_length=1)]
    text: Annotated[str, Field(min_length=1)]
    at_least: float | None = None
    at_most: float | None = None
    decides: bool = True


def judged(criterion: Criterion, estimate: Estimate) -> Verdict | None:
    """Supported if the whole interval is where it must be, not supported if none of it is; None without a criterion."""
    low = -float("inf") if criterion.at_least is None else criterion.at_least
    high = float("inf") if criterion.at_most is None else criterion.at_most
    if criterion.at_least is None and criterion.at_most is None:
        return None
    if low <= estimate.low and estimate.high <= high:
        return "supported"
    if estimate.high < low or high < estimate.low:
        return "not supported"
    return "inconclusive"


def overall(criteria: Sequence[Criterion], verdicts: Sequence[Verdict | None], *, contested: bool = False) -> Verdict:
    """Of a claim: what its deciding parts agree on; contested where some hold and others do not.

    Args:
        criteria, verdicts: of each part.
        contested: that the literature is divided and parts stand for its sides: then nothing less than agreement of all
            that is measured settles it.
    """
    parts: set[Verdict] = {v for c, v in zip(criteria, verdicts, strict=True) if c.decides and v is not None}
    if len(parts) == 1 and not (contested and parts == {"inconclusive"}):
        return parts.pop()
    if contested or {"supported", "not supported"} <= parts:
        return "contested"
    return "inconclusive"
