"""Readers of files: MNIST's, CIFAR-10's, arrays and folders of images. Pixels stay the bytes that they are."""

import gzip
import importlib.util
import math
import struct
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
CIFAR = (*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin")
PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp"}
COLOURS, SIDE = 3, 32  # of CIFAR-10


class Part(NamedTuple):
    """Examples `[n, ...]` and their labels `[n]`; arrays in memory, or mapped from a file."""

    images: np.ndarray
    labels: np.ndarray


def mnist(folder: Path) -> tuple[Part, Part]:
    """Read the training and the test images from the four IDX files in `folder`, each as it is or with `.gz`.

    Raises:
        ValueError: a file is missing, or its length is not that of its header.
    """
    images, labels, test_images, test_labels = (_idx(_find(folder, name)) for name in IDX)
    return Part(images, labels), Part(test_images, test_labels)


def cifar10(folder: Path) -> tuple[Part, Part]:
    """Read the training and the test images from the six files of CIFAR-10's binary version in `folder`.

    Raises:
        ValueError: a file is missing, or does not hold whole records.
    """
    parts = []
    for path in [_find(folder, name) for name in CIFAR]:
        raw = np.frombuffer(_bytes(path), np.uint8)
        if not raw.size or raw.size % (1 + COLOURS * SIDE**2):
            raise ValueError(f"{path}: must hold whole records of 3,073 bytes; got {raw.size}. Download it again.")
        rows = raw.reshape(-1, 1 + COLOURS * SIDE**2)
        planes = rows[:, 1:].reshape(-1, COLOURS, SIDE, SIDE)
        parts.append(Part(planes.transpose(0, 2, 3, 1), rows[:, 0].astype(np.int32)))
    *train, test = parts
    return Part(*(np.concatenate(arrays) for arrays in zip(*train, strict=True))), test


def npz(path: Path) -> Part:
    """Read `x` and `y` from an `.npz` file."""
    try:
        with np.load(path, allow_pickle=False) as held:
            if missing := {"x", "y"} - set(held.files):
                raise ValueError(
                    f"it has no `{'` and `'.join(sorted(missing))}`, but {', '.join(held.files) or 'nothing'}"
                )
            return Part(held["x"], held["y"])
    except Exception as error:  # a damaged archive raises errors of many kinds
        raise ValueError(f"{path}: must be an `.npz` of arrays `x` and `y`; {error}.") from None


def npy(folder: Path) -> Part:
    """Map `x.npy` into memory, of which only the rows that are asked for are read, and read `y.npy`."""
    arrays = []
    for name in ("x.npy", "y.npy"):
        try:
            arrays.append(np.load(_find(folder, name), mmap_mode="r", allow_pickle=False))
        except (ValueError, OSError, EOFError) as error:
            raise ValueError(f"{folder / name}: must be an array in NumPy's format; {error}.") from None
    return Part(arrays[0], np.asarray(arrays[1]))


def pictures(folder: Path) -> Part:
    """Read a folder of images, with a folder for each class; all of one size, grey or in colours."""
    from PIL import Image, UnidentifiedImageError

    classes = sorted(p for p in folder.iterdir() if p.is_dir())
    paths = [(p, k) for k, c in enumerate(classes) for p in sorted(c.iterdir()) if p.suffix.lower() in PICTURES]
    images, first = [], None
    for path, _ in paths:
        try:
            with Image.open(path) as opened:
                kind = "L" if opened.mode in ("1", "L", "I", "I;16") else "RGB"
                images.append(np.asarray(opened.convert(kind)).reshape(opened.height, opened.width, -1))
        except (OSError, UnidentifiedImageError) as error:
            raise ValueError(f"{path}: must be an image that Pillow reads; {error}.") from None
        first = first or (path, images[0].shape)
        if images[-1].shape != first[1]:
            raise ValueError(
                f"{path}: all images must have the size and colours of {first[0].name}, {first[1]}; got "
                f"{images[-1].shape}. Resize them first."
            )
    return Part(np.stack(images), np.array([k for _, k in paths], np.int32))


def japanese_vowels() -> tuple[Part, Part]:
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
        parts.append(Part(x, np.array([int(line[-1]) - 1 for line in lines], np.int32)))
    return parts[0], parts[1]


def _find(folder: Path, name: str) -> Path:
    """The file `name`, or with `.gz`."""
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise ValueError(f"{folder}: must be a folder that holds {name}; there is none. Check the path.")


def _bytes(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: must be a file that can be read; {error}.") from None


def _idx(path: Path) -> np.ndarray:
    """Read a file of unsigned bytes in the IDX format."""
    raw = _bytes(path)
    dimensions = raw[3] if len(raw) > 3 and raw[:3] == b"\0\0\x08" else 0
    start = 4 + 4 * dimensions
    shape: tuple[Any, ...] = struct.unpack(f">{dimensions}I", raw[4:start]) if len(raw) >= start else ()
    if not dimensions or not shape or len(raw) != start + math.prod(shape):
        raise ValueError(
            f"{path}: must be IDX, unsigned bytes of as many as its header says; got {len(raw)} bytes that begin with "
            f"{raw[:4].hex(' ')}. Download it again."
        )
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)
