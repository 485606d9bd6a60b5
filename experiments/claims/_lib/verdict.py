"""Answer from estimates and criteria, by one rule for all claims; the report says what was made after results."""

import math
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Literal, NamedTuple

from pydantic.dataclasses import dataclass
from scipy import stats

from experiments.claims._lib.intervals import Estimate
from experiments.training.config import STRICT, Text

Verdict = Literal["holds", "fails", "no difference", "undecided"]
Estimates = dict[str, Estimate | None]  # None: the record is older than the criterion
HEAD = re.compile(r"[^(]* (?:on|with|of|over|at) ")  # of a scope, up to its last preposition
ALPHA, MOST = 0.05, 1_000  # of a claim's deciding parts together; more seeds than this are out of reach
POINTS, FACTOR = 1.0, 1.25  # a difference of accuracies and a ratio up to these are none that matters
CHECKS = {"grid": "a wider grid", "steps": "twice the steps", "split": "other splits", "machine": "another machine"}


@dataclass(frozen=True, config=STRICT)
class Criterion:
    """A number, and its bounds as they were set before the run.

    Attributes:
        key: which of the claim's estimates.
        text: the number in words.
        at_least, at_most: what it has to be; both for a range, neither for a number that is only reported.
        scope: the case of the claim that it decides, to follow "holds for"; empty if it decides nothing.
        shown: whether it is among the five rows that are not folded away; what decides comes first.
        sentence: of the source texts, that this number answers beside the claim.
        published: the same number of a paper, and `by` whom; drawn beside ours.
    """

    key: Text
    text: Text
    at_least: float | None = None
    at_most: float | None = None
    scope: str = ""
    shown: bool = False
    sentence: str = ""
    published: float | None = None
    by: str = ""

    @property
    def bounds(self) -> str:
        """The bounds in words."""
        least, most = (None if b is None else f"{b:g}" for b in (self.at_least, self.at_most))
        if least and most:
            return f"from {least} to {most}"
        return f"at least {least}" if least else f"at most {most}" if most else ""


class Part(NamedTuple):
    """A criterion judged.

    Attributes:
        verdict: None if nothing is judged.
        p: of the hypothesis that the number is at its bound.
        needs: the number of values that would decide it.
        otherwise: the verdicts of those checks that differ from the measurement's, `measured`.
    """

    verdict: Verdict | None
    p: float = 1.0
    needs: int | None = None
    measured: Verdict | None = None
    otherwise: Mapping[str, Verdict] = MappingProxyType({})


def judge(
    criteria: Sequence[Criterion], estimates: Estimates, checks: Mapping[str, Mapping[str, Verdict]] | None = None
) -> list[Part]:
    """Judge each criterion: those that decide by Holm's procedure over all of them, the others by themselves.

    A number in its bounds holds if the hypothesis that it is at the nearest bound is rejected, and fails likewise. If
    it is not, and the interval lies within `POINTS` or `FACTOR` of no effect, there is no difference. An estimate with
    a caveat decides nothing, nor does one that came out otherwise in one of the `checks`, verdicts by kind and key.
    """
    found = _judge(criteria, estimates)
    for i, (c, part) in enumerate(zip(criteria, found, strict=True)):
        if c.scope and part.verdict not in (None, "undecided"):
            said: dict[str, Verdict] = {kind: by[c.key] for kind, by in (checks or {}).items() if c.key in by}
            differ: dict[str, Verdict] = {k: v for k, v in said.items() if v != part.verdict}
            if differ:
                found[i] = Part("undecided", part.p, None, part.verdict, differ)
    return found


def _judge(criteria: Sequence[Criterion], estimates: Estimates) -> list[Part]:
    sides = [_side(c, e) if (e := estimates[c.key]) else (False, 1.0) for c in criteria]
    judged = [bool(c.bounds) for c in criteria]
    deciding = sorted((i for i, c in enumerate(criteria) if c.scope and judged[i]), key=lambda i: sides[i][1])
    rejected, going = {i: p <= ALPHA for i, (_, p) in enumerate(sides)}, True
    for rank, i in enumerate(deciding):
        going = going and sides[i][1] <= ALPHA / (len(deciding) - rank)
        rejected[i] = going
    found = []
    for i, c in enumerate(criteria):
        good, p = sides[i]
        e = estimates[c.key]
        if not judged[i]:
            found.append(Part(None))
        elif not e:
            found.append(Part("undecided"))
        elif rejected[i] and not e.caveat:
            found.append(Part("holds" if good else "fails", p))
        elif not e.caveat and _is_negligible(c, e):
            found.append(Part("no difference", p))
        else:
            found.append(Part("undecided", p, None if e.caveat else _needs(e, p)))
    return found


def answer(criteria: Sequence[Criterion], parts: Sequence[Part], estimates: Estimates, *, brief: bool = False) -> str:
    """Return the answer in one sentence, made of the scopes of the parts that decide; `brief` without the n needed."""
    order = ("holds for {}", "fails for {}", "no difference for {}", "undecided for {}")
    groups: dict[str, list[str]] = {kind: [] for kind in order}
    for c, part in zip(criteria, parts, strict=True):
        if not (c.scope and part.verdict):
            continue
        e = estimates[c.key]
        if part.verdict == "undecided" and (e is None or e.caveat):
            reason = e.caveat.split(":")[0] if e else "not measured yet"
            groups.setdefault(f"undecided, as {reason}, for {{}}", []).append(c.scope)
        elif part.otherwise:
            groups.setdefault("undecided, as a check changes it, for {}", []).append(c.scope)
        elif part.verdict == "undecided":
            needs = f"about n = {part.needs} needed" if part.needs else "no n in reach"
            groups["undecided for {}"].append(c.scope if brief else f"{c.scope} ({needs})")
        else:
            groups[f"{part.verdict} for {{}}"].append(c.scope)
    said = "; ".join(kind.format(grouped(scopes)) for kind, scopes in groups.items() if scopes)
    return f"{said[:1].upper()}{said[1:]}."


def overall(criteria: Sequence[Criterion], parts: Sequence[Part]) -> str:
    """Return the answer in a word or two."""
    found = {part.verdict for c, part in zip(criteria, parts, strict=True) if c.scope and part.verdict}
    return found.pop() or "" if len(found) == 1 else "in part" if "holds" in found else "not shown"


def listed(items: Sequence[str]) -> str:
    """Join with commas and an and."""
    return " and ".join(filter(None, [", ".join(items[:-1]), items[-1]])) if items else ""


def grouped(scopes: Sequence[str]) -> str:
    """Join scopes with commas and an and; what several say before their last preposition is said once."""
    tails: dict[tuple[str, str], list[str]] = {}
    for scope in scopes:
        found = HEAD.match(scope)
        head = found[0] if found else ""
        tail = scope[len(head) :]
        tails.setdefault((head, "" if head else tail), []).append(tail)
    items = [head + listed(group) for (head, _), group in tails.items()]
    comma = "," if len(items) < len(scopes) else ""
    return f"{', '.join(items[:-1])}{comma} and {items[-1]}" if len(items) > 1 else items[0]


def _side(c: Criterion, e: Estimate) -> tuple[bool, float]:
    """Return whether the value is in its bounds, and the p of the bound that matters."""
    bounds = [(b, sign) for b, sign in ((c.at_least, 1), (c.at_most, -1)) if b is not None]
    broken = [b for b, sign in bounds if sign * (e.value - b) < 0]
    return not broken, min((e.p(b) for b in broken), default=max((e.p(b) for b, _ in bounds), default=1.0))


def _is_negligible(c: Criterion, e: Estimate) -> bool:
    """Return whether the interval is within what does not matter: of accuracies about 0, of ratios about 1."""
    bounds = {c.at_least, c.at_most} - {None}
    if e.unit == "pp" and bounds == {0.0}:
        return bool(max(-e.low, e.high) <= POINTS)
    return bool(not e.unit and bounds == {1.0} and e.low >= 1 / FACTOR and e.high <= FACTOR)


def _needs(e: Estimate, p: float) -> int | None:
    """Return how many values would show this effect in four of five runs: 2.8 standard errors off the bound.

    By a test at 5% of this case alone.
    """
    off = float(stats.t.isf(p / 2, max(e.n - 1, 1)))  # in standard errors
    needs = max(e.n + 1, math.ceil(e.n * (2.8 / off) ** 2)) if 0 < off < math.inf else MOST + 1
    return needs if needs <= MOST else None
