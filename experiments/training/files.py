"""MNIST and CIFAR-10 from files that a user already has.

What a file says of itself is compared with what it holds before anything is believed: a declared size before memory is
taken for it, the parts of a pickle before an array is made of them.
"""

import gzip
import io
import math
import pickle
import pickletools
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8

Items = UInt8[np.ndarray, "n *item"]
Pixels = UInt8[np.ndarray, "n pixels"]
Digits = Int32[np.ndarray, " n"]

GZIP, PICKLE, UNSIGNED_BYTE = b"\x1f\x8b", b"\x80", 8  # how files begin, and the type of IDX that is read
CHUNK = 1 << 20  # bytes that are read at once while their number is not known
COLOURS, SIDE = 3, 32  # of CIFAR-10
VALUES = COLOURS * SIDE * SIDE
BATCHES = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch")
AGAIN = "Copy or download it again"


class Part(NamedTuple):
    """Images, a row of values from 0 to 255 for each, and their labels from 0 to 9."""

    images: Pixels
    labels: Digits


def mnist(folder: Path) -> tuple[Part, Part]:
    """MNIST: the training and the test images, 28x28 pixels row by row.

    Args:
        folder: with the four IDX files, each as it is or with `.gz`.

    Raises:
        ValueError: a file is missing or is not what it should be.
    """
    wanted = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    paths: dict[str, Any] = {}
    with _told(_folder(folder)):
        for name in wanted:
            spellings = [folder / (s + end) for s in (name, name.replace("-idx", ".idx")) for end in ("", ".gz")]
            paths[name] = next(filter(Path.is_file, spellings), None)
        if missing := [name for name, path in paths.items() if not path]:
            raise _incomplete(folder, missing, f"{', '.join(wanted)}, each as it is or with `.gz`")
    images, labels, test_images, test_labels = paths.values()
    return _idx_pair(images, labels), _idx_pair(test_images, test_labels)


def cifar10(folder: Path) -> tuple[Part, Part]:
    """CIFAR-10: the training and the test images, 32x32 pixels row by row, the three colours of each side by side.

    Args:
        folder: with the six files of the binary or of the python version, or the folder around theirs. Where both
            versions are whole, the binary one is read.

    Raises:
        ValueError: a file is missing or is not what it should be.
    """
    choices = []
    with _told(_folder(folder)):
        for inner, end, read in (("cifar-10-batches-bin", ".bin", _records), ("cifar-10-batches-py", "", _pickled)):
            for place in (folder, folder / inner):
                paths = [place / (name + end) for name in BATCHES]
                choices.append(([path.name for path in paths if not path.is_file()], place, paths, read))
        missing, place, paths, read = min(choices, key=lambda choice: len(choice[0]))
        if missing:
            wanted = "data_batch_1.bin to data_batch_5.bin and test_batch.bin, or all six without `.bin`"
            raise _incomplete(folder if len(missing) == len(BATCHES) else place, missing, wanted)
    *train, test = [read(path) for path in paths]
    return Part(np.concatenate([p.images for p in train]), np.concatenate([p.labels for p in train])), test


def _wrong(path: Path, rule: str, got: str, fix: str = AGAIN) -> ValueError:
    """The error of what is in `path`."""
    return ValueError(f"{path}: {rule}; got {got}. {fix}.")


def _folder(folder: Any) -> Path:
    """`folder`, which is one."""
    if not isinstance(folder, Path):
        raise TypeError(f"`folder` must be a `pathlib.Path`; got {folder!r}. Write `Path(...)` around it.")
    with _told(folder):
        if folder.is_dir():
            return folder
        got, fix = "a path that does not exist", "Check the path"
        if folder.is_file():
            archive = zipfile.is_zipfile(folder) or tarfile.is_tarfile(folder)
            got = "an archive" if archive else "a file"
            fix = "Unpack it first and name the folder that comes of it" if archive else "Name the folder that it is in"
    raise _wrong(folder, "must be the folder that holds the files", got, fix)


def _incomplete(folder: Path, missing: list[str], wanted: str) -> ValueError:
    """The error of a folder without the files `missing`."""
    names = sorted(path.name for path in folder.iterdir())
    archives = [name for name in names if name.lower().endswith((".tar", ".tar.gz", ".tgz", ".zip"))]
    holds = f"with {', '.join(names[:6])}{' and more' if names[6:] else ''}" if names else "that is empty"
    fix = f"Unpack {archives[0]} first" if archives else "Add what is missing, or name the folder that holds all"
    return _wrong(folder, f"must hold {wanted}", f"a folder {holds}, without {', '.join(missing)}", fix)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """What the system or gzip cannot read of `path`, told in our words."""
    try:
        yield
    except (gzip.BadGzipFile, zlib.error, EOFError):
        raise _wrong(path, "must be whole gzip", "a truncated or damaged file") from None
    except OSError as error:
        got, fix = f"'{error.strerror or error}'", "Check the path and who may read it"
        raise _wrong(path, "must be readable", got, fix) from None


@contextmanager
def _opened(path: Path) -> Iterator[io.BufferedIOBase]:
    """The bytes of `path`, unpacked where its name ends in `.gz`."""
    named = path.suffix == ".gz"
    with _told(path), path.open("rb") as raw, gzip.open(raw) if named else raw as file:
        start = raw.peek(2)[:2]
        if named != (start == GZIP):
            rule = "gzip, which begins with 1f 8b, and nothing else must have `.gz` at the end of its name"
            got, fix = start.hex(" ") or "an empty file", "Change the name, or copy or download the file again"
            raise _wrong(path, rule, got, fix)
        yield file


def _size(file: io.BufferedIOBase) -> int:
    """How many bytes `file` holds, found without keeping them."""
    size = sum(len(chunk) for chunk in iter(partial(file.read, CHUNK), b""))
    file.seek(0)
    return size


def _labels(path: Path, values: list[Any]) -> Digits:
    """The labels in `path`, all of them from 0 to 9."""
    for at, value in enumerate(values):
        if type(value) is not int or not 0 <= value <= 9:
            raise _wrong(path, "labels must be integers from 0 to 9", f"{value!r} for image {at}")
    return np.array(values, np.int32)


def _idx_pair(images: Path, labels: Path) -> Part:
    """The images and labels of two IDX files."""
    pixels, values = _idx(images, (28, 28)), _idx(labels, ())
    if len(pixels) != len(values):
        got, fix = f"{len(values)} labels for the {len(pixels)} images of {images.name}", "Take both from one copy"
        raise _wrong(labels, "must hold a label for each image", got, fix)
    return Part(pixels.reshape(len(pixels), -1), _labels(labels, values.tolist()))


def _idx(path: Path, item: tuple[int, ...]) -> Items:
    """What the IDX file `path` holds: unsigned bytes, each item of the shape `item`."""
    what, ndim = "images" if item else "labels", 1 + len(item)
    start = 4 + 4 * ndim
    with _opened(path) as file:
        head = file.read(start)
        if head[:2] != bytes(2)[: len(head)]:
            raise _wrong(path, "an IDX file must begin with 00 00", head[:2].hex(" "))
        if len(head) > 2 and head[2] != UNSIGNED_BYTE:
            rule = f"{what} must be unsigned bytes, type code 0x08"
            raise _wrong(path, rule, f"type code {head[2]:#04x}", "Save them as bytes")
        if len(head) > 3 and head[3] != ndim:
            fix = "Check that images and labels are not under each other's names"
            raise _wrong(path, f"{what} must have {ndim} dimensions in IDX", f"{head[3]}", fix)
        if len(head) < start:
            raise _wrong(path, f"must begin with a header of {start} bytes", f"{len(head)} bytes, truncated")
        n, *shape = struct.unpack(f">{ndim}I", head[4:])
        if tuple(shape) != item:
            fix = "Check that the file is MNIST's"
            raise _wrong(path, "images must have 28x28 pixels", "x".join(map(str, shape)), fix)
        if n == 0:
            raise _wrong(path, "must hold one image at least", f"0 {what}")
        file.seek(0)
        declared, held = start + n * math.prod(item), _size(file)
        if held != declared:
            got = f"{held}, {'too long' if held > declared else 'truncated'}"
            raise _wrong(path, f"must hold the {declared} bytes that its header says", got)
        return np.frombuffer(bytearray(file.read()), np.uint8, offset=start).reshape(n, *item)


def _side_by_side(planes: Pixels) -> Pixels:
    """Images that are a plane for each colour, with the colours of each pixel side by side."""
    return planes.reshape(-1, COLOURS, SIDE, SIDE).transpose(0, 2, 3, 1).reshape(-1, VALUES)


def _records(path: Path) -> Part:
    """A file of the binary version: for each image a byte of label and three planes of colour."""
    record = 1 + VALUES
    with _opened(path) as file:
        size = _size(file)
        if size == 0 or size % record:
            got = f"{size} bytes, {'truncated or too long' if size else 'no image'}"
            raise _wrong(path, f"must hold one image at least, and whole records of {record} bytes", got)
        rows = np.frombuffer(file.read(), np.uint8).reshape(-1, record)
    return Part(_side_by_side(rows[:, 1:]), _labels(path, rows[:, 0].tolist()))


def _pickled(path: Path) -> Part:
    """A file of the python version: a pickle of a dict with `data` and `labels`, by Python 2 or 3."""
    found, fix = _unpickled(path), "Check that the file is CIFAR-10's"
    if not isinstance(found, dict):
        raise _wrong(path, "must hold a dict", _kind(found), fix)
    data, labels = (found.get(key.encode(), found.get(key)) for key in ("data", "labels"))
    if data is None or labels is None:
        keys = ", ".join(sorted(map(str, found))[:6]) or "none"
        raise _wrong(path, "must have the keys data and labels", keys, fix)
    planes = _array(path, data)
    if not isinstance(labels, list) or len(labels) != len(planes):
        got = f"{len(labels)} labels" if isinstance(labels, list) else _kind(labels)
        raise _wrong(path, f"labels must be a list of one for each of the {len(planes)} images", got)
    return Part(_side_by_side(planes), _labels(path, labels))


class _Refused(Exception):  # noqa: N818
    """A pickle names what no array needs."""


class _Described:
    """What a pickle would have called, with what, and the state that it sets: kept as it is and never called."""

    def __init__(self, *args: Any):
        self.args, self.state = args, None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _encoded(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes for Python 2."""
    if encoding != "latin1":
        raise _Refused(f"_codecs.encode to {encoding}")
    return text.encode("latin1")


STAND_INS = {
    "numpy.ndarray": _Described,
    "numpy.dtype": partial(_Described, "dtype"),
    **{f"numpy.{core}.multiarray._reconstruct": partial(_Described, "array") for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": partial(_Described, "buffer") for core in ("core", "_core")},
    "_codecs.encode": _encoded,
    **{f"{module}.bytes": lambda: b"" for module in ("__builtin__", "builtins")},
}


class _Unpickler(pickle.Unpickler):
    """Reads numbers, texts, lists and dicts, and describes arrays; whatever else a pickle names is refused."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        """What stands in for the function or class of that name."""
        name = f"{module_name}.{global_name}"
        if name not in STAND_INS:
            raise _Refused(name)
        # A fresh object: a pickle may set attributes of what it is handed.
        return partial(STAND_INS[name])


def _unpickled(path: Path) -> Any:
    """What the pickle `path` holds, with arrays as `_Described`."""
    with _opened(path) as file:
        data = file.read()
    if data[:1] != PICKLE:
        rule = "must be a pickle of protocol 2 or newer, which begins with 80"
        raise _wrong(path, rule, data[:1].hex() or "an empty file")
    try:
        end = 0
        for opcode, argument, at in pickletools.genops(data):  # which compares each declared length with what is there
            end = (at or 0) + 1
            # The reader takes memory for all numbers up to the one under which it keeps an object.
            if "PUT" in opcode.name and int(argument or 0) > len(data):
                raise ValueError
        if end < len(data):
            raise ValueError
        return _Unpickler(io.BytesIO(data), encoding="bytes").load()
    except _Refused as refused:
        rule, fix = "a pickle of CIFAR-10 must name NumPy arrays only", "It may do harm: take it from another source"
        raise _wrong(path, rule, f"{refused}, which was not run", fix) from None
    except Exception:  # of many kinds: bytes that are no pickle follow no rule
        raise _wrong(path, "must be one whole pickle", "one that is truncated, damaged or too long") from None


def _kind(value: Any) -> str:
    """The type of an unpickled value, for messages."""
    return "a NumPy object" if isinstance(value, _Described) else type(value).__name__


def _array(path: Path, value: Any) -> Pixels:
    """The array that a pickle describes."""
    match value:
        case _Described(args=("array", *_), state=(_, shape, _Described(args=("dtype", code, *_)), columns, raw)):
            pass
        case _Described(args=("buffer", raw, _Described(args=("dtype", code, *_)), shape, order)):
            columns = order in ("F", b"F")
        case _:
            raise _wrong(path, "data must be a NumPy array", _kind(value))
    if code not in ("u1", b"u1"):
        raise _wrong(path, "data must have the dtype uint8, which pickles call u1", f"{code}", "Save it as uint8")
    match shape:
        case (int(n), width) if width == VALUES and n > 0:
            pass
        case _:
            raise _wrong(path, f"data must have the shape (n, {VALUES}) with one image at least", f"{shape}")
    held = len(raw) if isinstance(raw, (bytes, bytearray)) else 0
    if held != n * VALUES:
        raise _wrong(path, f"data of shape {shape} must have {n * VALUES} bytes", f"{held}")
    return np.frombuffer(raw, np.uint8).reshape((n, VALUES), order="F" if columns else "C")
