"""A run: a claim in words and its settings, read from TOML, changed on the command line, always validated.

A config names the config it builds upon in `base` and holds only what differs. The words are not inherited: every
config that is run says for itself what it asks and what it expects.
"""

import dataclasses
import difflib
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from experiments.training.check import check

Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]
Arm = Literal["batch", "none", "ghost", "renorm", "group", "domains", "conditional", "whiten"]
Evaluation = Literal[
    "running", "recalibrated", "shifted", "adapted", "shrunk", "own", "weighed", "folded", "ill", "cured"
]

STRICT = ConfigDict(strict=True, extra="forbid")


@dataclass(frozen=True, config=STRICT)
class Claim:
    """A claim in words; every field is required.

    Attributes:
        question: what the run finds out.
        source: where the claim was made.
        command: how to run it.
        expected: what we predict, said before the run.
        cost: how much work it is.
    """

    question: Text
    source: Text
    command: Text
    expected: Text
    cost: Text


WORDS = tuple(f.name for f in dataclasses.fields(Claim))


@dataclass(frozen=True, config=STRICT)
class Settings:
    """The settings of a run.

    Attributes:
        arms: the norms to compare, each a run of its own from the same weights over the same batches.
        data: `digits`, `mnist_5k`, `japanese_vowels`, or the path of files; see `data.load`.
        model: `mlp` on the values of an example, `cnn` on images, `lstm` on sequences, or on images row by row.
        widths: hidden units of each layer of the MLP, channels of each 3x3 convolution of the CNN, or the hidden units
            of the LSTM, one number.
        activation: after each hidden layer.
        init: standard deviation of the weights: `constant` is `init_scale`, `he` is `init_scale * sqrt(2 / fan_in)`.
        init_scale: see `init`.
        bn_momentum: the fraction of the running statistics that each step keeps.
        ghost_batches: of the arm `ghost`, into how many parts the whole batch is cut, on any number of devices.
        norm_groups: of the arm `group`, group norm, how many groups of channels.
        r_max, d_max: of the arm `renorm`, the limits of the correction.
        whiten_size: of the arm `whiten`, how many features are whitened together.
        domains: `digits`; or `inverted`, where every other image of a batch is a negative. The arm `domains` has
            statistics, scale and bias for each kind, the arm `conditional` scale and bias alone.
        optimizer: `momentum` is SGD with momentum 0.9.
        learning_rates: all are trained at once; each arm is judged at its best by validation.
        seeds: how many seeds, counted from 0, trained at once; each sets the weights and the order of the examples.
        batch_size: examples a step, over all devices.
        last_batch: of an epoch, where it is short: `drop` it, or `pad` and mask it.
        steps: training steps.
        log_every: steps between two lines of the log, which is also the length of one compiled loop.
        target_accuracy: the table tells how many steps it took to reach this validation accuracy.
        evaluations: with which statistics, and on which images, the arm `batch` is tested or reported on; see
            `statistics`.
        devices: how many devices share each batch.
        groups: how many rows of devices the mesh has; with 1 it has one axis.
        way: `jit` shards arrays on an Auto mesh, `explicit` on an Explicit mesh; `shard_map` and `pmap` name the axes.
        statistics: batch statistics of the whole batch (`global`), of the part of each of the `groups`, or of each
            device (`per_device`).
    """

    arms: Annotated[tuple[Arm, ...], Field(min_length=1)]
    data: Text
    model: Literal["mlp", "cnn", "lstm"]
    widths: Annotated[tuple[Positive, ...], Field(min_length=1)]
    activation: Literal["sigmoid", "tanh", "relu"]
    init: Literal["constant", "he"]
    init_scale: Rate
    bn_momentum: Annotated[float, Field(ge=0, le=1)]
    ghost_batches: Positive
    norm_groups: Positive
    r_max: Annotated[float, Field(ge=1)]
    d_max: Annotated[float, Field(ge=0)]
    whiten_size: Positive
    domains: Literal["digits", "inverted"]
    optimizer: Literal["sgd", "momentum", "adam"]
    learning_rates: Annotated[tuple[Rate, ...], Field(min_length=1)]
    seeds: Positive
    batch_size: Positive
    last_batch: Literal["drop", "pad"]
    steps: Positive
    log_every: Positive
    target_accuracy: Annotated[float, Field(gt=0, le=1)]
    evaluations: Annotated[tuple[Evaluation, ...], Field(min_length=1)]
    devices: Positive
    groups: Positive
    way: Literal["jit", "explicit", "shard_map", "pmap"]
    statistics: Literal["global", "groups", "per_device"]

    @property
    def parts(self) -> int:
        """Return the number of parts of the batch that have statistics of their own."""
        return {"global": 1, "groups": self.groups, "per_device": self.devices}[self.statistics]


@dataclasses.dataclass(frozen=True)
class Config:
    """A named claim with its settings.

    Attributes:
        name: of the file.
        claim: in words, of the settings in the file.
        settings: of the run.
        overridden: the names of those that are not as in the file.
    """

    name: str
    claim: Claim
    settings: Settings
    overridden: tuple[str, ...] = ()


KEYS = (*WORDS, *(f.name for f in dataclasses.fields(Settings)), "base")


def load(path: Path) -> Config:
    """Read the config in the file at `path`, complete and validated.

    Raises:
        ValueError, TypeError: what is wrong, naming the file and the key.
    """
    own = read(path)
    claim = validated(Claim, {k: v for k, v in own.items() if k in WORDS}, str(path))
    return Config(path.stem, claim, inherited(path, own))


def inherited(path: Path, own: dict[str, Any]) -> Settings:
    """Return the settings of the config at `path` that holds `own`, over those of its bases; words do not count."""
    return settings({k: v for k, v in _merged(path, own).items() if k not in (*WORDS, "base")}, str(path))


def settings(values: dict[str, Any], where: str) -> Settings:
    """Validate `values` as settings, each and all of them together; `where` is named in errors."""
    s = validated(Settings, values, where)
    check(s, where)
    return s


def changed(config: Config, new: Settings) -> Config:
    """Return `config` with settings from the command line, which are validated like those of a file."""
    values = {f.name: getattr(new, f.name) for f in dataclasses.fields(new)}
    overridden = tuple(name for name, value in values.items() if value != getattr(config.settings, name))
    return dataclasses.replace(config, settings=settings(values, "command line"), overridden=overridden)


def _merged(path: Path, own: dict[str, Any], *seen: Path) -> dict[str, Any]:
    """Return the values of `path` over those of its bases; an unknown key is refused where it stands."""
    for key in own:
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, 1)
            hint = f"Did you mean `{near[0]}`?" if near else f"The keys are {', '.join(KEYS)}."
            raise ValueError(f"{path}: unknown key `{key}`. {hint}")
    if "base" not in own:
        return own
    base, seen = path.parent / str(own["base"]), (*seen, path.resolve())
    if base.resolve() in seen:
        raise ValueError(f"{path}: `base` must not lead back to where it came from; got {own['base']!r}.")
    if not base.is_file():
        raise ValueError(f"{path}: `base` must name a config relative to this file; got {own['base']!r}, not a file.")
    return _merged(base, read(base), *seen) | own


def read(path: Path) -> dict[str, Any]:
    """Read a TOML file, with tuples for lists."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: a config must be a readable file; {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: a config must be TOML; {error}.") from None
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def validated(kind: type, values: dict[str, Any], where: str) -> Any:
    """Make a `kind` of `values`."""
    try:
        return kind(**values)
    except ValidationError as error:
        raise refusal(error, kind, where) from None


def refusal(error: ValidationError, kind: type, where: str) -> ValueError | TypeError:
    """Return the first of the errors in our words: which key, what came and what is expected."""
    first = error.errors()[0]
    key = str(first["loc"][0])
    if first["type"] == "missing":
        here = "here or in a base" if kind is Settings else "here: words are not inherited, and a base alone is not run"
        return ValueError(f"{where}: `{key}` is missing; it must be given {here}.")
    entry = f", entry {first['loc'][1]}" if len(first["loc"]) > 1 else ""
    expected = first["msg"][:1].lower() + first["msg"][1:]
    wrong = TypeError if first["type"].endswith("_type") else ValueError
    return wrong(f"{where}: `{key}`{entry}: {expected}; got {first['input']!r}.")
