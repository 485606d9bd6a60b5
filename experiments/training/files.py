"""Readers of files: MNIST's, CIFAR-10's, arrays and folders of images. Pixels stay bytes."""

import contextlib
import gzip
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
CIFAR = (*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin")
PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp"}
COLOURS, SIDE = 3, 32  # of CIFAR-10


class Split(NamedTuple):
    """Examples `[n, ...]` and their labels `[n]`; in networks an example is a row of values.

    In memory these are arrays; of a file that is mapped into memory `images` are an array like it, or `data.Rows`.
    """

    images: Any
    labels: Any


@contextlib.contextmanager
def _reading(path: Path, kind: str) -> Iterator[None]:
    """Name the file, and say what it must be, where it cannot be read."""
    try:
        yield
    except Exception as error:  # damaged files raise errors of many kinds
        raise ValueError(f"{path}: must be {kind}; {error}. Make or download it again.") from None


def mnist(folder: Path) -> tuple[Split, Split]:
    """Read the training and the test images from the four IDX files in `folder`, each as it is or with `.gz`.

    Raises:
        ValueError: a file is missing, or its length is not that of its header.
    """
    images, labels, test_images, test_labels = (_idx(_find(folder, name)) for name in IDX)
    return Split(images, labels), Split(test_images, test_labels)


def _idx(path: Path) -> np.ndarray:
    with _reading(path, "IDX, unsigned bytes of as many as its header says"):
        raw = _bytes(path)
        shape = np.frombuffer(raw, ">u4", count=raw[3], offset=4)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def cifar10(folder: Path) -> tuple[Split, Split]:
    """Read the training and the test images from the six files of CIFAR-10's binary version in `folder`.

    Raises:
        ValueError: a file is missing, or does not hold whole records.
    """
    *train, test = [_records(_find(folder, name)) for name in CIFAR]
    return Split(*(np.concatenate(arrays) for arrays in zip(*train, strict=True))), test


def _records(path: Path) -> Split:
    with _reading(path, "whole records of 3,073 bytes"):
        rows = np.frombuffer(_bytes(path), np.uint8).reshape(-1, 1 + COLOURS * SIDE**2)
    planes = rows[:, 1:].reshape(-1, COLOURS, SIDE, SIDE)
    return Split(planes.transpose(0, 2, 3, 1), rows[:, 0].astype(np.int32))


def npz(path: Path) -> Split:
    """Read `x` and `y` from an `.npz` file."""
    with _reading(path, "an `.npz` of arrays `x` and `y`"), np.load(path, allow_pickle=False) as held:
        return Split(held["x"], held["y"])


def npy(folder: Path) -> Split:
    """Map `x.npy` into memory, of which only the rows that are asked for are read, and read `y.npy`."""
    x, y = (_map(_find(folder, name)) for name in ("x.npy", "y.npy"))
    return Split(x, np.asarray(y))


def _map(path: Path) -> np.ndarray:
    with _reading(path, "an array in NumPy's format"):
        return np.load(path, mmap_mode="r", allow_pickle=False)


def pictures(folder: Path) -> Split:
    """Read a folder of images, with a folder for each class; all of one size, grey or in colours."""
    from PIL import Image

    classes = sorted(p for p in folder.iterdir() if p.is_dir())
    paths = [(p, k) for k, c in enumerate(classes) for p in sorted(c.iterdir()) if p.suffix.lower() in PICTURES]
    images = []
    for path, _ in paths:
        with _reading(path, "an image that Pillow reads"), Image.open(path) as opened:
            kind = "L" if opened.mode in ("1", "L", "I", "I;16") else "RGB"
            images.append(np.asarray(opened.convert(kind)).reshape(opened.height, opened.width, -1))
        if images[-1].shape != images[0].shape:
            raise ValueError(
                f"{path}: all images must have the size and colours of {paths[0][0].name}, {images[0].shape}; got "
                f"{images[-1].shape}. Resize them first."
            )
    return Split(np.stack(images), np.array([k for _, k in paths], np.int32))


def japanese_vowels() -> tuple[Split, Split]:
    """Read JapaneseVowels (Kudo, Toyama and Shimbo 1999) from the files of the package aeon.

    Sequences `[n, 29, 12]` of 7 to 29 steps by nine speakers; after its end a sequence is NaN.
    """
    found = importlib.util.find_spec("aeon")
    if found is None or not found.submodule_search_locations:
        raise ValueError("data japanese_vowels is in the package aeon; run `pip install --no-deps aeon`.")
    folder = Path(found.submodule_search_locations[0]) / "datasets" / "data" / "JapaneseVowels"
    parts = []
    for kind in ("TRAIN", "TEST"):
        text = _bytes(_find(folder, f"JapaneseVowels_{kind}.ts")).decode()
        lines = [line.split(":") for line in text.split("@data")[1].split()]
        x = np.full((len(lines), 29, 12), np.nan, np.float32)
        for row, (*channels, _) in zip(x, lines, strict=True):
            values = np.array([channel.split(",") for channel in channels], np.float32).T
            row[: len(values)] = values
        parts.append(Split(x, np.array([int(line[-1]) - 1 for line in lines], np.int32)))
    return parts[0], parts[1]


def _find(folder: Path, name: str) -> Path:
    """Return the path of the file `name`, or with `.gz`."""
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise ValueError(f"{folder}: must be a folder that holds {name}; there is none. Check the path.")


def _bytes(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
