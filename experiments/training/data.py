"""The digits, their split, and which examples each step sees."""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from experiments.training import files
from experiments.training.config import TEST, VALIDATION
from experiments.training.shapes import Count, Images, Labels, Order

SPLIT_SEED = 0  # one split for all experiments: no run may choose its test set
MOST = 2_000  # images to validate and to test with, of larger collections


class Split(NamedTuple):
    """Images in [0, 1], row by row, and their digits."""

    images: Images
    labels: Labels


class Data(NamedTuple):
    """The three parts of the data: to learn from, to choose by, and to report on once."""

    train: Split
    validation: Split
    test: Split


def digits(split: int = SPLIT_SEED) -> Data:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels: 1,149 to train, 288 to validate, 360 to test.

    Each part has all digits in the same proportions. Some pixels are 0 in every image. `split` numbers other splits of
    the same sizes.
    """
    pixels, labels = load_digits(return_X_y=True)
    images, labels = np.asarray(pixels / 16, np.float32), np.asarray(labels, np.int32)
    rest, test = train_test_split(np.arange(len(labels)), test_size=TEST, random_state=split, stratify=labels)
    train, validation = train_test_split(rest, test_size=VALIDATION, random_state=split, stratify=labels[rest])
    return Data(*(Split(images[part], labels[part]) for part in (train, validation, test)))


def batches(seed: Count, first: Count, *, steps: int, batch_size: int, examples: int) -> Order:
    """The examples of `steps` steps from step `first` on: a function of the seed and the step alone.

    Each epoch is a fresh permutation cut into whole batches; the few examples left over sit that epoch out. One
    permutation is made for each epoch that the steps touch, not for each step: sorting costs as much as training.

    Args:
        seed: of the run. Arms, learning rates and numbers of devices do not enter: all see the same examples.
        first: the number of the first step.
        steps: how many steps.
        batch_size: examples a step.
        examples: how many there are to draw from.

    Returns:
        Indices in [0, examples).
    """
    in_epoch = examples // batch_size
    step = first + jnp.arange(steps, dtype=jnp.int32)
    epoch, start = step // in_epoch, step[0] // in_epoch
    touched = start + jnp.arange((steps + in_epoch - 2) // in_epoch + 1, dtype=jnp.int32)
    key = jax.random.fold_in(jax.random.key(seed), 1)  # 0 makes the weights
    orders = jax.vmap(lambda e: jax.random.permutation(jax.random.fold_in(key, e), examples))(touched)
    cut = orders[:, : in_epoch * batch_size].reshape(-1, in_epoch, batch_size)
    return cut[epoch - start, step % in_epoch]


def mnist(folder: Path) -> Data:
    """MNIST from its files; see `files.mnist`."""
    return _divided(*files.mnist(folder))


def cifar10(folder: Path) -> Data:
    """CIFAR-10 from its files; see `files.cifar10`. An image is rows of pixels of three colours."""
    return _divided(*files.cifar10(folder))


def _divided(training: files.Part, test: files.Part) -> Data:
    """2,000 images for validation and for the test, or a fifth of smaller files, in the classes' proportions.

    Every accuracy is measured after every chunk of steps and for every seed: all 10,000 would cost more than training.
    """

    def some(part: files.Part, most: int) -> tuple[np.ndarray, np.ndarray]:
        size, at = min(most, len(part.labels) // 5), np.arange(len(part.labels))
        kept, drawn = train_test_split(at, test_size=size, random_state=SPLIT_SEED, stratify=part.labels)
        return np.sort(kept), np.sort(drawn)

    def split(part: files.Part, rows: np.ndarray) -> Split:
        return Split((part.images[rows] / np.float32(255)).astype(np.float32), part.labels[rows])

    learned, chosen_by = some(training, MOST)
    return Data(split(training, learned), split(training, chosen_by), split(test, some(test, MOST)[1]))
