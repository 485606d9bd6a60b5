"""A claim's config: the words, the criteria, and the settings that its measurement starts from."""

import dataclasses
from pathlib import Path
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from experiments.claims._lib.verdict import Criterion
from experiments.training import config
from experiments.training.config import STRICT, Settings, Text


@dataclass(frozen=True, config=STRICT)
class ClaimConfig:
    """A claim; all but `settings` and `name` is in its file word for word.

    Attributes:
        name: of its folder.
        number: its place in the report.
        claim: the sentence that is tested.
        question, source, command, expected: as in every config.
        where: the networks, data and steps that it was tested on, for the table.
        criteria: in the order of the report; the first is the effect that the table shows.
        settings: what the measurement starts from.
        needs: packages that are in no extra, because only their data are read.
    """

    name: str
    number: Annotated[int, Field(gt=0)]
    claim: Text
    question: Text
    source: Text
    command: Text
    expected: Text
    where: Text
    criteria: Annotated[tuple[Criterion, ...], Field(min_length=1)]
    settings: Settings
    needs: tuple[str, ...] = ()


def load(path: Path) -> ClaimConfig:
    """Read the claim in the file at `path`, complete and validated.

    Raises:
        ValueError, TypeError: what is wrong, naming the file and the key.
    """
    own = config.read(path)
    words = {f.name for f in dataclasses.fields(ClaimConfig)} - {"name", "settings"}
    values = {k: v for k, v in own.items() if k in words}
    values["criteria"] = tuple(_criterion(c, path) for c in values.get("criteria", ()))
    settings = config.inherited(path, {k: v for k, v in own.items() if k not in words})
    loaded = config.validated(ClaimConfig, {**values, "name": path.parent.name, "settings": settings}, str(path))
    keys = [c.key for c in loaded.criteria]
    if len(set(keys)) != len(keys):
        raise ValueError(f"{path}: `criteria` must not hold a key twice; got {keys}.")
    return loaded


def load_all(folder: Path) -> list[ClaimConfig]:
    """Read all claims of `folder` in the order of their numbers.

    Raises:
        ValueError, TypeError: as `load`, or two have the same number.
    """
    loaded = sorted((load(path) for path in folder.glob("*/config.toml")), key=lambda c: c.number)
    numbers = [c.number for c in loaded]
    if len(set(numbers)) != len(numbers):
        raise ValueError(f"{folder}: no two claims may have the same number; got {numbers}.")
    return loaded


def _criterion(values: object, path: Path) -> Criterion:
    if not isinstance(values, dict):
        raise TypeError(f"{path}: each of `criteria` must be a table with a key and a text; got {values!r}.")
    return config.validated(Criterion, values, str(path))
