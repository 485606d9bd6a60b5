"""What a claim is measured with: the data, the shared trainer with something to watch, and a memory of finished parts.

A measurement is made of parts, each the numbers of a training or two. A finished part is kept in a file under the hash
of all that it depends on: what was asked, the data, the versions and the source. So an interrupted run goes on where it
stopped, and a part that anything has changed for is measured again.
"""

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import disk
from experiments.training import config, record, train
from experiments.training.data import Data
from experiments.training.models import Model

ROOT = Path(__file__).parents[2]
BASE = config.settings(config.read(ROOT / "configs" / "base.toml"), "configs/base.toml")
SMOKE_SEEDS, SMOKE_STEPS, SMOKE_RATES = 2, 40, 2


class StoppedError(Exception):
    """The user has pressed Ctrl-C; what was finished is on disk."""


class Log(NamedTuple):
    """What a training reports after every chunk, `[seeds, rates, logged]`."""

    steps: np.ndarray
    train_loss: np.ndarray
    val_loss: np.ndarray
    val_accuracy: np.ndarray
    test_accuracy: np.ndarray


class Trained(NamedTuple):
    """A finished training: its log, where it ended, and what it was compiled to."""

    log: Log
    carry: train.Carry
    arm: train.Arm


@dataclasses.dataclass
class Study:
    """The conditions of a measurement.

    Attributes:
        data: the images.
        smoke: whether everything is made as small as it can be, to see that it runs.
        folder: where finished parts are kept.
        source: the hash of the program.
        tick: called often; raises `StoppedError` to end.
        seconds: what the parts have taken, in this run or in the one that measured them.
        asked: what each part was asked.
    """

    data: Data
    smoke: bool
    folder: Path
    source: str = ""
    tick: Callable[[], None] = lambda: None
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    asked: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    @property
    def pixels(self) -> int:
        """Values of an image."""
        return self.data.train.images.shape[1]

    def seeds(self, n: int) -> int:
        """So many seeds, or few."""
        return min(n, SMOKE_SEEDS) if self.smoke else n

    def few(self, values: Sequence[Any]) -> tuple[Any, ...]:
        """All of `values`, or the first and the last."""
        return (values[0], values[-1]) if self.smoke and len(values) > SMOKE_RATES else tuple(values)

    def part(self, name: str, asked: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `measure` returns, from the file of an earlier call if nothing has changed.

        Args:
            name: of the part, to recognize its file by.
            asked: all that the numbers depend on and that the hash would not know otherwise, for JSON.
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
        """`given` with `changes`, on one device, small if this is a smoke run."""
        s = dataclasses.replace(given, devices=1, way="jit", statistics="global", **changes)
        if not self.smoke:
            return s
        every = min(s.log_every, SMOKE_STEPS // 2)
        return dataclasses.replace(
            s,
            seeds=self.seeds(s.seeds),
            learning_rates=self.few(s.learning_rates),
            log_every=every,
            steps=min(s.steps // every, max(2, SMOKE_STEPS // every)) * every,
        )

    def fit(
        self,
        s: config.Settings,
        model: Model,
        *,
        data: Data | None = None,
        optimizer: Callable[[Any], Any] | None = None,
        start: Callable[[train.Carry], train.Carry] | None = None,
        watch: Callable[[int, train.Carry], None] | None = None,
        test: bool = True,
    ) -> Trained:
        """Train `model` from all seeds at all learning rates of `s` with the shared trainer.

        Args:
            s: from `settings`; the network is `model` and not theirs.
            model: the network.
            data: other data than the study's, of the same sizes if nothing is to be compiled anew.
            optimizer: of a learning rate, in the place of that of the settings.
            start: changes what training starts from.
            watch: called with the number of steps done and where training stands, before the first step and after
                every chunk.
            test: whether to log accuracy on the test images; where nothing is made of it, it is left out (NaN).
        """
        data, arm = data or self.data, train.compile_arm(s, model, optimizer)
        return self.refit(s, arm, data, start, watch, test)

    def refit(
        self,
        s: config.Settings,
        arm: train.Arm,
        data: Data,
        start: Callable[[train.Carry], train.Carry] | None = None,
        watch: Callable[[int, train.Carry], None] | None = None,
        test: bool = True,
    ) -> Trained:
        """As `fit`, with what was compiled before."""
        rows: list[Any] = []

        def log(step: int, metrics: train.Metrics, carry: train.Carry) -> None:
            tested = jax.device_get(arm.evaluate(carry, data.test)[1]) if test else np.full_like(metrics[-1], np.nan)
            rows.append((step, *metrics, tested))
            if watch:
                watch(step, carry)
            self.tick()

        begun = arm.start() if start is None else start(arm.start())
        if watch:
            watch(0, begun)
        end = train.train(s, arm, data, log, start=begun)
        steps, *curves = zip(*rows, strict=True)
        return Trained(Log(np.array(steps), *(np.stack(c, -1) for c in curves)), end.carry, arm)


def chosen(log: Log) -> int:
    """The index of the learning rate with the best final validation accuracy, the mean over seeds.

    Of equals the one with the lower loss. One for all seeds: whoever tunes a rate does so once.
    """
    accuracy = log.val_accuracy[:, :, -1].mean(0)
    loss = np.where(np.isfinite(log.val_loss[:, :, -1]), log.val_loss[:, :, -1], np.inf).mean(0)
    return int(np.lexsort((loss, -accuracy))[0])


def tested(log: Log, rate: int) -> np.ndarray:
    """Test accuracy of each seed at the step with the best validation accuracy, the first of several."""
    at = np.argmax(log.val_accuracy[:, rate], axis=-1)
    return np.take_along_axis(log.test_accuracy[:, rate], at[:, None], -1)[:, 0]


def at_rate(carry: train.Carry, rate: int) -> train.Carry:
    """The runs of one learning rate, `[seeds, 1, ...]`."""
    return jax.tree.map(lambda v: v[:, rate : rate + 1], carry)


def plain(value: Any) -> Any:
    """`value` as JSON has it: lists, and numbers of six digits; what is not finite as a word."""
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
    """What `plain` made words of, as numbers again."""
    if isinstance(value, dict):
        return {k: numbers(v) for k, v in value.items()}
    if isinstance(value, list):
        return [numbers(v) for v in value]
    return float(value) if value in ("inf", "-inf", "nan") else value


def differing(asked: Any, given: config.Settings) -> Any:
    """What a part was asked, for JSON; of settings only what differs from those `given` by the config."""
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


def source_files(name: str) -> list[Path]:
    """Of the program that measures the claim `name`: the library, the trainer, and the modules of the claims."""
    here = ROOT / "experiments"
    trainer = [here / "__init__.py", here / "disk.py", *(here / "training").glob("*.py")]
    own = ("__init__.py", "study.py", "networks.py", "intervals.py", "measured/__init__.py", f"measured/{name}.py")
    return sorted((*(ROOT / "jaxbn").rglob("*.py"), *trainer, *(here / "claims" / part for part in own)))


def source_hash(name: str) -> str:
    """Of `source_files`."""
    return hashlib.sha256(b"".join(p.read_bytes() for p in source_files(name))).hexdigest()
