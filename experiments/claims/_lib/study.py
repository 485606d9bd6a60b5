"""The conditions of a measurement: the data, the shared trainer, and a memory of finished parts.

A measurement is made of parts, each the numbers of a training or two. A finished part is kept in a file under the hash
of all that it depends on: the request, the data, the versions and the source. So an interrupted run goes on where it
stopped, and a part is measured again if anything has changed for it.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import disk
from experiments.claims._lib.trained import Log, Trained
from experiments.claims._lib.values import numbers, plain
from experiments.training import config, feed, record, train
from experiments.training.data import Data, Split
from experiments.training.models import Model

ROOT = Path(__file__).parents[3]
BASE = config.settings(config.read(ROOT / "configs" / "base.toml"), "configs/base.toml")
# To compile a network of this size as well as XLA can takes longer than to train it.
QUICK = {"xla_backend_optimization_level": 1}
SMOKE_SEEDS, SMOKE_STEPS, SMOKE_RATES = 2, 40, 2
WIDER = 3.0  # a check takes rates so many times lower and larger


class StoppedError(Exception):
    """The user has pressed Ctrl-C; what was finished is on disk."""


@dataclasses.dataclass
class Study:
    """The conditions of a measurement.

    Attributes:
        data: the images.
        split: makes other splits of them by number; `data` is that of `first_split`. None if there is only that one.
        vary: how a check departs from the measurement: a wider `grid`, twice the `steps`, other `split`s, or not at
            all, on another `machine`.
        smoke: whether everything is made as small as it can be, to see that it runs.
        folder: where finished parts are kept.
        source: the hash of the program.
        tick: called often; raises `StoppedError` to end.
        seconds: of each part, in this run or in the one that measured it.
        asked: the request of each part.
    """

    data: Data
    smoke: bool
    folder: Path
    source: str = ""
    split: Callable[[int], Data] | None = None
    vary: str = ""
    tick: Callable[[], object] = lambda: None
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    asked: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def on(self, number: int) -> "Study":
        """Return the same on split `number`, for the seed of that number."""
        if not (self.split and number):
            return self
        return dataclasses.replace(self, data=self.split(first_split(self.vary) + number))

    def few(self, values: Sequence[Any]) -> tuple[Any, ...]:
        """Return all of `values`, or the first and the last in a smoke run."""
        return (values[0], values[-1]) if self.smoke and len(values) > SMOKE_RATES else tuple(values)

    def part(self, name: str, asked: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the result of `measure`, from the file of an earlier call if nothing has changed.

        Args:
            name: of the part, to recognize its file by.
            asked: all that the numbers depend on beside data, versions and source, for JSON.
            measure: returns numbers, lists and arrays by name.
        """
        self.tick()
        parts = [self.data.train, self.data.validation, self.data.test]
        seen = hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for split in parts for a in split)).hexdigest()
        known = {"asked": asked, "smoke": self.smoke, "data": seen, "source": self.source}
        text = json.dumps(known | {"versions": record.versions()}, sort_keys=True, default=repr)
        path = self.folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
        if not path.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            began = time.perf_counter()
            found = plain(measure())
            disk.write_checked(path, {"seconds": time.perf_counter() - began, "found": found})
        kept = disk.read_checked(path, "Delete it, and it is measured again.")
        self.seconds[path.name] = kept["seconds"]
        self.asked[name] = asked
        return numbers(kept["found"])

    def settings(self, given: config.Settings, **changes: Any) -> config.Settings:
        """Return `given` with `changes`, on one device, small if this is a smoke run."""
        s = dataclasses.replace(given, devices=1, way="jit", statistics="global", **changes)
        if not self.smoke:
            return s
        every = min(s.log_every, SMOKE_STEPS // 2)
        return dataclasses.replace(
            s,
            seeds=min(s.seeds, SMOKE_SEEDS),
            learning_rates=self.few(s.learning_rates),
            log_every=every,
            steps=min(s.steps // every, max(2, SMOKE_STEPS // every)) * every,
        )

    def varied(self, s: config.Settings) -> config.Settings:
        """Return `s` as they are, or in a check with a wider grid or twice the steps."""
        rates = s.learning_rates
        if self.vary == "grid" and len(rates) > 1:
            return dataclasses.replace(s, learning_rates=(min(rates) / WIDER, *rates, max(rates) * WIDER))
        return dataclasses.replace(s, steps=2 * s.steps) if self.vary == "steps" else s

    def fit(
        self,
        s: config.Settings,
        model: Model | train.Arm,
        *,
        data: Data | list[Data] | None = None,
        optimizer: Callable[[Any], Any] | None = None,
        start: Callable[[train.Carry], train.Carry] | None = None,
        first_seed: int = 0,
        watch: Callable[[int, train.Carry], None] | None = None,
        test: bool = True,
    ) -> Trained:
        """Train `model` from all seeds at all learning rates of `s` with the shared trainer.

        Args:
            s: from `settings`; the network is `model` and not theirs.
            model: the network, or an arm that was compiled before for data of the same sizes.
            data: other data than the study's; a list has a split for each seed.
            optimizer: of a learning rate, instead of that of the settings.
            start: changes the first carry.
            first_seed: of the initial weights.
            watch: called with the number of steps done and the carry, before the first step and after every chunk.
            test: whether to log accuracy on the test images; NaN if not.
        """
        arm = model if isinstance(model, train.Arm) else train.compile_arm(s, model, optimizer, QUICK)
        if isinstance(data, list):
            splits = data
            arm = arm._replace(feed=lambda first, _: feed_each(s, first, splits))
        data = stacked(data or self.data)
        rows: list[Any] = []

        def log(step: int, metrics: train.Metrics, carry: train.Carry) -> None:
            tested = jax.device_get(arm.evaluate(carry, data.test)[1]) if test else np.full_like(metrics[-1], np.nan)
            rows.append((step, *metrics, tested))
            if watch:
                watch(step, carry)
            self.tick()

        begun = arm.start(np.int32(first_seed))
        begun = start(begun) if start else begun
        if watch:
            watch(0, begun)
        end = train.train(s, arm, data, log, start=begun)
        steps, *curves = zip(*rows, strict=True)
        return Trained(Log(np.array(steps), *(np.stack(c, -1) for c in curves)), end.carry, arm)

    def learned(self, done: Trained, data: Data | list[Data] | None = None) -> np.ndarray:
        """Return the accuracy at the end on as many training images as there are in the test, `[seeds, rates]`."""
        both = stacked(data or self.data)
        *leading, count, _ = both.test.images.shape  # the same shapes, so that nothing is compiled again
        rows = (*(slice(None) for _ in leading), slice(count))
        some = Split(*(v[rows] for v in both.train))
        return np.asarray(done.arm.evaluate(done.carry, some)[1])

    def clock(self, s: config.Settings, arms: dict[str, train.Arm], warm: int, timed: int) -> dict[str, list[float]]:
        """Measure the seconds of a step of one network of each arm, in turns."""
        # One image to validate by: evaluation is no part of a step.
        data = self.data._replace(validation=Split(*(v[:1] for v in self.data.validation)))
        # Time does not depend on values, and to compile the making of weights would take long.
        like = {name: jax.eval_shape(arm.start) for name, arm in arms.items()}
        full = partial(jnp.issubdtype, arg2=jnp.floating)
        at = jax.tree.map(lambda v: jnp.full(v.shape, 0.1 if full(v.dtype) else 0, v.dtype), like)
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        warm, timed = (1, 3) if self.smoke else (warm, timed)
        for call in range(warm + timed):
            for name, arm in arms.items():
                began = time.perf_counter()
                at[name] = jax.block_until_ready(arm.advance(at[name], np.asarray(0, np.int32), data))[0]
                if call >= warm:
                    seconds[name].append((time.perf_counter() - began) / s.log_every)
            self.tick()
        return seconds


def stacked(data: Data | list[Data]) -> Data:
    """Return `data`, of splits one for each seed as arrays `[seeds, ...]`."""
    if not isinstance(data, list):
        return data
    train, validation, test = jax.tree.map(lambda *v: np.stack(v), *(own[:3] for own in data))
    return data[0]._replace(train=train, validation=validation, test=test)


def first_split(vary: str) -> int:
    """Return the number of the first split of the data: a check takes others than the measurement."""
    return 100 if vary == "split" else 0


def feed_each(s: config.Settings, first: int, splits: list[Data]) -> feed.Feed:
    """Return the examples of a chunk, of each seed from its own split."""
    rows = list(zip(splits, feed.order(s, len(splits[0].train.labels), first), strict=True))
    images, labels = (np.stack([split.train[i][at] for split, at in rows]) for i in (0, 1))
    return feed.Feed(images, labels, None)
