"""MNIST and CIFAR-10 from files: each format is read as it is written, and what is wrong with a file is named.

The files are written here by hand, byte by byte, with one or two images.
"""

import contextlib
import gzip
import inspect
import os
import pickle
import re
import shutil
import struct
import tarfile
import tempfile
import traceback
import tracemalloc
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.training import files

LAWS = settings(deadline=None, max_examples=40, derandomize=True)
MNIST = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]
CIFAR = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def part(seed, n, width):
    """Random images and labels."""
    rng = np.random.default_rng(seed)
    images, labels = rng.integers(0, 256, (n, width), np.uint8), rng.integers(0, 10, n, np.int32)
    return files.Part(images, labels)


def idx(values, code=8):
    """An IDX file of `values`."""
    return (
        struct.pack(f">BBBB{values.ndim}I", 0, 0, code, values.ndim, *values.shape) + values.astype(np.uint8).tobytes()
    )


def record(p):
    """A file of CIFAR-10's binary version."""
    return np.concatenate([p.labels[:, None].astype(np.uint8), p.images], axis=1).tobytes()


def python3(p, protocol=4, order="C", key=str.encode):
    """A file of CIFAR-10's python version, as Python 3 writes it."""
    data = np.array(p.images, order=order)
    return pickle.dumps({key("data"): data, key("labels"): p.labels.tolist(), key("filenames"): ["a"]}, protocol)


def numpy1(p):
    """The same by NumPy 1, which had other names for its modules."""
    new, old = b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"
    assert new in python3(p, 2) or old in python3(p, 2)
    return python3(p, 2).replace(new, old)


def numpy2(p):
    """The same by NumPy 2."""
    return numpy1(p).replace(b"cnumpy.core.multiarray\n", b"cnumpy._core.multiarray\n")


def text(value):
    """A string of Python 2 in a pickle."""
    return b"U" + bytes([len(value)]) + value


def python2(p):
    """The same by Python 2, opcode by opcode: keys, names and pixels are strings of bytes."""
    n, raw = len(p.images), p.images.tobytes()
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + text(b"b") + b"tR"
    dtype = (
        b"cnumpy\ndtype\n("
        + text(b"u1")
        + b"K\x00K\x01tR(K\x03"
        + text(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    state = (
        b"(K\x01(M"
        + struct.pack("<HBH", n, ord("M"), 3072)
        + b"t"
        + dtype
        + b"\x89T"
        + struct.pack("<i", len(raw))
        + raw
        + b"tb"
    )
    labels = b"](" + b"".join(b"K" + bytes([label]) for label in p.labels.tolist()) + b"e"
    entries = (
        text(b"batch_label") + text(b"training batch 1 of 5") + text(b"labels") + labels + text(b"data") + array + state
    )
    return b"\x80\x02}q\x01(" + entries + b"u."


PICKLES = {
    **{f"protocol {p}": partial(python3, protocol=p) for p in (2, 3, 4, 5)},
    "columns first": partial(python3, order="F"),
    "columns first, protocol 5": partial(python3, order="F", protocol=5),
    "keys of text": partial(python3, key=str),
    "NumPy 1": numpy1,
    "NumPy 2": numpy2,
    "Python 2": python2,
}


def write_mnist(folder, train, test, spell=lambda name: name):
    """The four files, under the names that `spell` makes of the usual ones."""
    values = [v for p in (train, test) for v in (p.images.reshape(-1, 28, 28), p.labels)]
    for name, value in zip(map(spell, MNIST), values, strict=True):
        content = idx(value)
        (folder / name).write_bytes(gzip.compress(content, 1) if name.endswith(".gz") else content)


def write_cifar(folder, parts, write=record, end=".bin"):
    """The six files."""
    folder.mkdir(exist_ok=True)
    for name, p in zip(CIFAR, parts, strict=True):
        (folder / (name + end)).write_bytes(write(p))


def colours_last(images):
    """The order in which images are returned, by the definition: one pixel after the other."""
    return np.stack([images[:, 1024 * c + pixel] for pixel in range(1024) for c in range(3)], axis=1)


def same(got, wanted):
    """The values, with shapes and dtypes."""
    for g, w in zip(got, wanted, strict=True):
        for array, value, dtype in ((g.images, w.images, np.uint8), (g.labels, w.labels, np.int32)):
            assert array.dtype == dtype
            np.testing.assert_array_equal(array, value, strict=True)


# What is written is read


@LAWS
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**32 - 1)),
    st.lists(st.tuples(st.booleans(), st.booleans()), min_size=4, max_size=4),
)
def test_mnist(sizes, spellings):
    train, test = part(sizes[2], sizes[0], 784), part(sizes[2] + 1, sizes[1], 784)
    names = {
        name: (name.replace("-idx", ".idx") if dot else name) + (".gz" if packed else "")
        for name, (dot, packed) in zip(MNIST, spellings, strict=True)
    }
    with tempfile.TemporaryDirectory() as folder:
        write_mnist(Path(folder), train, test, names.get)
        same(files.mnist(Path(folder)), (train, test))


@pytest.mark.parametrize("write", [record, *PICKLES.values()], ids=["binary", *PICKLES])
def test_cifar10(tmp_path, write):
    parts = [part(i, 1 + i % 2, 3072) for i in range(6)]
    write_cifar(tmp_path, parts, write, ".bin" if write is record else "")
    train = (np.concatenate([colours_last(p.images) for p in parts[:5]]), np.concatenate([p.labels for p in parts[:5]]))
    same(files.cifar10(tmp_path), (files.Part(*train), parts[5]._replace(images=colours_last(parts[5].images))))


@LAWS
@given(st.integers(0, 2), st.integers(0, 31), st.integers(0, 31), st.sampled_from([record, python2]))
def test_where_a_pixel_goes(colour, row, column, write):
    """A single bright value of the files is found where row, column and colour say."""
    images = np.zeros((1, 3, 32, 32), np.uint8)
    images[0, colour, row, column] = 255
    p = files.Part(images.reshape(1, -1), np.array([3], np.int32))
    with tempfile.TemporaryDirectory() as folder:
        write_cifar(Path(folder), [p] * 6, write, ".bin" if write is record else "")
        (found,) = files.cifar10(Path(folder))[1].images.reshape(-1, 32, 32, 3)
    assert np.argwhere(found).tolist() == [[row, column, colour]]


@pytest.mark.parametrize(("inner", "write", "end"), [("bin", record, ".bin"), ("py", python2, "")])
def test_the_folder_around(tmp_path, inner, write, end):
    parts = [part(i, 1, 3072) for i in range(6)]
    write_cifar(tmp_path / f"cifar-10-batches-{inner}", parts, write, end)
    same(files.cifar10(tmp_path), files.cifar10(tmp_path / f"cifar-10-batches-{inner}"))


def test_which_of_several_is_read(tmp_path):
    """The whole version, of two whole ones the binary, and the unpacked file."""
    one, other = [part(0, 1, 3072)] * 6, [part(1, 1, 3072)] * 6
    write_cifar(tmp_path, one)
    binary = files.cifar10(tmp_path)
    write_cifar(tmp_path, other, python2, "")
    same(files.cifar10(tmp_path), binary)
    (tmp_path / "test_batch.bin").unlink()
    assert not np.array_equal(files.cifar10(tmp_path)[1].images, binary[1].images)
    write_mnist(tmp_path, part(0, 1, 784), part(1, 1, 784))
    write_mnist(tmp_path, part(2, 1, 784), part(3, 1, 784), "{}.gz".format)
    same(files.mnist(tmp_path), (part(0, 1, 784), part(1, 1, 784)))


def test_the_arrays_are_the_callers(tmp_path):
    """They can be written to."""
    write_mnist(tmp_path, part(0, 1, 784), part(1, 1, 784))
    write_cifar(tmp_path, [part(0, 1, 3072)] * 6)
    for p in (*files.mnist(tmp_path), *files.cifar10(tmp_path)):
        p.images[0, 0], p.labels[0] = 1, 1


# What is wrong is named

TWO = part(7, 2, 3072)
LOADERS = {"mnist": files.mnist, "packed": files.mnist, "binary": files.cifar10, "python": files.cifar10}


def whole(folder, kind):
    """A folder in which nothing is wrong; of the python version only the first file can be damaged."""
    if kind in ("mnist", "packed"):
        write_mnist(folder, part(0, 2, 784), part(1, 1, 784), "{}.gz".format if kind == "packed" else str)
    else:
        write_cifar(folder, [TWO] * 6, *((record, ".bin") if kind == "binary" else (python2, "")))
    return folder


def refused(load, *words):
    """That `load` raises a ValueError of ours with all of `words`."""
    with pytest.raises(ValueError, match=re.escape(words[0])) as caught:
        load()
    assert type(caught.value) is ValueError
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    assert traceback.extract_tb(caught.value.__traceback__)[-1].filename == files.__file__
    for word in words:
        assert word in str(caught.value)


def of(**changes):
    """A pickle of the dict of the python version with other entries, those that are None left out."""
    entries = {"data": TWO.images, "labels": TWO.labels.tolist()} | changes
    return lambda _: pickle.dumps({k.encode(): v for k, v in entries.items() if v is not None}, 4)


def head(*values):
    """Another header of an IDX file of images."""
    return lambda content: struct.pack(">BBBBIII", *values) + content[16:]


def labelled(*values):
    """An IDX file of these labels."""
    return lambda _: idx(np.array(values))


IMAGES, LABELS = MNIST[:2]
IMAGES_GZ, BATCH, BATCH_BIN = IMAGES + ".gz", CIFAR[0], CIFAR[0] + ".bin"

# The folder, the file in it, what becomes of its bytes, and what the error must say beside the file's name.
DAMAGE = {
    "truncated images": (
        "mnist",
        IMAGES,
        lambda b: b[:-1],
        ["the 1584 bytes", "got 1583, truncated", "download it again"],
    ),
    "images too long": ("mnist", IMAGES, lambda b: b + b"0", ["the 1584 bytes", "got 1585, too long"]),
    "header alone": ("mnist", IMAGES, lambda b: b[:16], ["got 16, truncated"]),
    "half a header": ("mnist", IMAGES, lambda b: b[:9], ["header of 16 bytes", "got 9 bytes, truncated"]),
    "an empty file": ("mnist", LABELS, lambda b: b"", ["header of 8 bytes", "got 0 bytes"]),
    "not IDX": ("mnist", IMAGES, lambda b: b"\x89PNG" + b, ["must begin with 00 00", "got 89 50"]),
    "floats": ("mnist", IMAGES, head(0, 0, 13, 3, 2, 28, 28), ["images must be unsigned bytes", "0x08", "0x0d"]),
    "labels as images": ("mnist", IMAGES, labelled(1, 2), ["images must have 3 dimensions", "got 1", "other's names"]),
    "images as labels": ("mnist", LABELS, head(0, 0, 8, 3, 1, 1, 1), ["labels must have 1 dimension", "got 3"]),
    "32x32": ("mnist", IMAGES, head(0, 0, 8, 3, 2, 32, 32), ["28x28", "got 32x32", "MNIST's"]),
    "no image": ("mnist", IMAGES, lambda b: head(0, 0, 8, 3, 0, 28, 28)(b)[:16], ["one image at least", "0 images"]),
    "a huge size": ("mnist", IMAGES, head(0, 0, 8, 3, 2**32 - 1, 28, 28), [f"{(2**32 - 1) * 784 + 16} bytes", "1584"]),
    "label 10": ("mnist", LABELS, labelled(9, 10), ["integers from 0 to 9", "got 10 for image 1"]),
    "other numbers": (
        "mnist",
        LABELS,
        labelled(1),
        ["a label for each image", "1 labels for the 2 images", "one copy"],
    ),
    "missing": (
        "mnist",
        IMAGES,
        lambda b: None,
        ["with t10k-images-idx3-ubyte, t10k", "without train-images-idx3-ubyte."],
    ),
    "packed, and not by name": ("mnist", IMAGES, gzip.compress, ["begins with 1f 8b", "`.gz`", "got 1f 8b"]),
    "packed by name alone": ("packed", IMAGES_GZ, gzip.decompress, ["begins with 1f 8b", "got 00 00", "the name"]),
    "an empty gzip": ("packed", IMAGES_GZ, lambda b: b"", ["1f 8b", "got an empty file"]),
    "truncated gzip": ("packed", IMAGES_GZ, lambda b: b[:-9], ["whole gzip", "truncated or damaged"]),
    "gzip of a header": ("packed", IMAGES_GZ, lambda b: b[:12], ["whole gzip", "truncated or damaged"]),
    "gzip of another sum": ("packed", IMAGES_GZ, lambda b: b[:-8] + bytes(8), ["whole gzip", "damaged"]),
    "gzip of another code": ("packed", IMAGES_GZ, lambda b: b[:10] + b"\xff" * 99, ["whole gzip", "damaged"]),
    "gzip and more": ("packed", IMAGES_GZ, lambda b: b + b"more", ["whole gzip", "damaged"]),
    "truncated inside gzip": (
        "packed",
        IMAGES_GZ,
        lambda b: gzip.compress(gzip.decompress(b)[:-1]),
        ["got 1583, truncated"],
    ),
    "a truncated record": ("binary", BATCH_BIN, lambda b: b[:-1], ["records of 3073 bytes", "6145 bytes, truncated"]),
    "a record too long": ("binary", BATCH_BIN, lambda b: b + b"0", ["records of 3073 bytes", "6147 bytes"]),
    "no record": ("binary", BATCH_BIN, lambda b: b"", ["one image at least", "0 bytes, no image"]),
    "a label of CIFAR-100": ("binary", BATCH_BIN, lambda b: b"\x63" + b[1:], ["from 0 to 9", "got 99 for image 0"]),
    "a missing batch": ("binary", BATCH_BIN, lambda b: None, ["data_batch_1.bin to", "without data_batch_1.bin."]),
    "a missing pickle": ("python", BATCH, lambda b: None, ["without `.bin`", "without data_batch_1."]),
    "an empty pickle": ("python", BATCH, lambda b: b"", ["must be a pickle", "got an empty file"]),
    "no pickle": ("python", BATCH, lambda b: record(TWO), ["must be a pickle of protocol 2 or newer", "got 0"]),
    "an old pickle": ("python", BATCH, lambda b: python3(TWO, 0), ["protocol 2 or newer", "got 28"]),
    "a truncated pickle": ("python", BATCH, lambda b: b[:-9], ["one whole pickle", "truncated"]),
    "a pickle and more": ("python", BATCH, lambda b: b + b".", ["one whole pickle", "too long"]),
    "a pickle of a list": ("python", BATCH, lambda b: pickle.dumps([1]), ["must hold a dict", "got list"]),
    "a pickle of an array": (
        "python",
        BATCH,
        lambda b: pickle.dumps(TWO.images, 4),
        ["must hold a dict", "a NumPy object"],
    ),
    "no data": ("python", BATCH, of(data=None), ["the keys data and labels", "got b'labels'", "CIFAR-10's"]),
    "fine labels": ("python", BATCH, of(labels=None, fine_labels=[1]), ["data and labels", "b'fine_labels'"]),
    "data a list": ("python", BATCH, of(data=TWO.images.tolist()), ["data must be a NumPy array", "got list"]),
    "data a dtype": ("python", BATCH, of(data=np.dtype("u1")), ["must be a NumPy array", "got a NumPy object"]),
    "float data": ("python", BATCH, of(data=TWO.images / 2), ["the dtype uint8", "got f8", "as uint8"]),
    "data of objects": ("python", BATCH, of(data=TWO.images.astype(object)), ["the dtype uint8", "got O8"]),
    "data as images": (
        "python",
        BATCH,
        of(data=TWO.images.reshape(2, 3, 32, 32)),
        ["the shape (n, 3072)", "got (2, 3, 32, 32)"],
    ),
    "data of MNIST": ("python", BATCH, of(data=TWO.images[:, :784]), ["the shape (n, 3072)", "got (2, 784)"]),
    "data of no image": ("python", BATCH, of(data=TWO.images[:0], labels=[]), ["one image at least", "(0, 3072)"]),
    "data of another length": (
        "python",
        BATCH,
        lambda b: b.replace(b"(M\x02\x00M\x00\x0c", b"(M\x03\x00M\x00\x0c"),
        ["9216 bytes", "got 6144"],
    ),
    "labels an array": ("python", BATCH, of(labels=TWO.labels), ["must be a list of one for each of the 2 images"]),
    "too many labels": ("python", BATCH, of(labels=[1, 2, 3]), ["each of the 2 images", "got 3 labels"]),
    "label -1": ("python", BATCH, of(labels=[0, -1]), ["integers from 0 to 9", "got -1 for image 1"]),
    "label 1.0": ("python", BATCH, of(labels=[1.0, 0]), ["integers from 0 to 9", "got 1.0 for image 0"]),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(tmp_path, name):
    kind, file, change, words = DAMAGE[name]
    path = whole(tmp_path, kind) / file
    content = change(path.read_bytes())
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    refused(partial(LOADERS[kind], tmp_path), str(tmp_path if content is None else path), *words)


@pytest.mark.parametrize("kind", LOADERS)
def test_every_cut_is_refused(tmp_path, kind):
    """Of a file of one image no beginning passes for a file, nor does the file with another byte."""
    load, write = LOADERS[kind], python2 if kind == "python" else record
    if kind in ("mnist", "packed"):
        write_mnist(tmp_path, part(0, 1, 784), part(1, 1, 784), "{}.gz".format if kind == "packed" else str)
    else:
        write_cifar(tmp_path, [part(0, 1, 3072)] * 6, write, "" if kind == "python" else ".bin")
    path = tmp_path / {"mnist": IMAGES, "packed": IMAGES_GZ, "binary": BATCH_BIN, "python": BATCH}[kind]
    content = path.read_bytes()
    for length in {*range(24), *range(24, len(content), 97), len(content) - 1}:
        path.write_bytes(content[:length])
        refused(partial(load, tmp_path), str(path))
    path.write_bytes(content + b"\x01")
    refused(partial(load, tmp_path), str(path))


@LAWS
@given(st.sampled_from(sorted(LOADERS)), st.data())
def test_no_bytes_raise_an_error_that_is_not_ours(kind, data):
    """After any change of a few bytes the file is read, or refused in our words."""
    name = {"mnist": IMAGES, "packed": IMAGES_GZ, "binary": BATCH_BIN, "python": BATCH}[kind]
    with tempfile.TemporaryDirectory() as folder:
        path = whole(Path(folder), kind) / name
        content = bytearray(path.read_bytes())
        # Where formats have their structure: at the beginning, and in a pickle also at the end.
        places = st.one_of(st.integers(0, 250), st.integers(-250, -1))
        for at, value in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=4)):
            content[at] = value
        path.write_bytes(content)
        with contextlib.suppress(ValueError):
            LOADERS[kind](Path(folder))
            return
        refused(partial(LOADERS[kind], Path(folder)), str(path))


# Folders


def archived(folder, name, write):
    """An archive of a whole folder."""
    (folder / "inside").mkdir()
    source = whole(folder / "inside", "mnist")
    with write(folder / name) as archive:
        for path in source.iterdir():
            (archive.add if hasattr(archive, "add") else archive.write)(path, path.name)
    return folder / name


def named(folder, name, content=b"0"):
    """A file."""
    (folder / name).write_bytes(content)
    return folder / name


PLACES = {
    "nothing": (lambda f: f / "none", "does not exist. Check the path"),
    "a name too long": (lambda f: f / ("n" * 5000), "must be readable; got 'File name too long'"),
    "a file": (lambda f: named(f, IMAGES), "got a file. Name the folder that it is in"),
    "a tar": (lambda f: archived(f, "m.tar.gz", partial(tarfile.open, mode="w:gz")), "got an archive. Unpack it first"),
    "a zip": (lambda f: archived(f, "m.zip", partial(zipfile.ZipFile, mode="w")), "got an archive. Unpack it first"),
    "an empty folder": (lambda f: f, "got a folder that is empty, without "),
    "a folder of an archive": (lambda f: named(f, "data.tar.gz").parent, "with data.tar.gz, without "),
    "an archive to unpack": (lambda f: named(f, "data.ZIP").parent, "Unpack data.ZIP first"),
    "a folder of folders": (lambda f: shutil.copytree(f, f / BATCH_BIN).parent, f"with {BATCH_BIN}, without "),
    "a folder of much": (
        lambda f: [named(f, str(i)).parent for i in range(9)].pop(),
        "with 0, 1, 2, 3, 4, 5 and more, ",
    ),
}


@pytest.mark.parametrize("load", [files.mnist, files.cifar10])
@pytest.mark.parametrize("place", PLACES)
def test_another_place_is_named(tmp_path, place, load):
    make, words = PLACES[place]
    folder = make(tmp_path)
    refused(partial(load, folder), str(folder), words)


@pytest.mark.parametrize("load", [files.mnist, files.cifar10])
def test_a_folder_that_is_no_path(load):
    """Without the type checks of the tests, which would be first."""
    with pytest.raises(TypeError, match=r"`folder` must be a `pathlib.Path`; got 'data'. Write `Path\(\.\.\.\)`"):
        inspect.unwrap(load)("data")


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    whole(tmp_path, "mnist")

    def forbidden(path, mode):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", forbidden)
    refused(partial(files.mnist, tmp_path), str(tmp_path / IMAGES), "must be readable", "Permission denied")


# What a file may not do


class Runs:
    """Unpickled, it calls a function."""

    def __init__(self, call, *args):
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


def test_a_pickle_runs_nothing(tmp_path):
    """Wherever it hides its call, and however it writes it."""
    mark = tmp_path / "mark"
    command = f"echo > {mark}"
    evil = Runs(os.system, command)
    texts = [pickle.dumps(found, p) for found in (evil, {b"data": evil}, [{b"labels": [evil]}]) for p in (2, 3, 4, 5)]
    texts += [pickle.dumps(Runs(eval, "1"), 4), pickle.dumps(Runs(getattr, "a", "upper"), 4)]
    texts += [b"\x80\x02(X" + struct.pack("<I", len(command)) + command.encode() + b"i" + b"posix\nsystem\n."]
    texts += [b"\x80\x04\x8c\x05numpy\x8c\x0cndarray.dump\x93.", b"\x80\x02cnumpy\nload\n."]
    texts += [b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00hex\x86R."]
    for content in texts:
        path = whole(tmp_path, "python") / BATCH
        path.write_bytes(content)
        refused(partial(files.cifar10, tmp_path), str(path), "NumPy arrays only", "was not run", "do harm")
        assert not mark.exists()
    pickle.loads(texts[0])
    assert mark.exists(), "the command would have run"


def test_a_pickle_leaves_nothing_behind(tmp_path):
    """One that sets what `numpy.dtype` is does so for itself alone."""
    path = whole(tmp_path, "python") / BATCH
    wanted, content = files.cifar10(tmp_path), path.read_bytes()
    path.write_bytes(b"\x80\x02cnumpy\ndtype\n(cnumpy\nndarray\n)}Ntb.")
    refused(partial(files.cifar10, tmp_path), "must hold a dict")
    path.write_bytes(content)
    same(files.cifar10(tmp_path), wanted)


MUCH = 1 << 26
GREEDY = {
    "images": ("mnist", IMAGES, head(0, 0, 8, 3, MUCH, 28, 28)),
    "packed images": (
        "packed",
        IMAGES_GZ,
        lambda b: gzip.compress(head(0, 0, 8, 3, MUCH, 28, 28)(gzip.decompress(b)), 1),
    ),
    "images too long": ("packed", IMAGES_GZ, lambda b: gzip.compress(gzip.decompress(b) + bytes(MUCH), 1)),
    "bytes": ("python", BATCH, lambda b: b"\x80\x05\x8e" + struct.pack("<Q", MUCH) + b"."),
    "a bytearray": ("python", BATCH, lambda b: b"\x80\x05\x96" + struct.pack("<Q", MUCH) + b"."),
    "a place to keep an object": ("python", BATCH, lambda b: b"\x80\x02}r" + struct.pack("<I", MUCH) + b"."),
    "an array": ("python", BATCH, lambda b: b.replace(b"(K\x00t", b"(J" + struct.pack("<I", MUCH) + b"t")),
}


@pytest.mark.parametrize("name", GREEDY)
def test_no_memory_for_what_is_not_there(tmp_path, name):
    """A file of a few kilobytes that declares many megabytes, or unpacks to them, costs a few chunks."""
    kind, file, change = GREEDY[name]
    path = whole(tmp_path, kind) / file
    path.write_bytes(change(path.read_bytes()))
    tracemalloc.start()
    try:
        if name == "an array":  # whose first shape means nothing
            LOADERS[kind](tmp_path)
        else:
            refused(partial(LOADERS[kind], tmp_path), str(path))
        assert tracemalloc.get_traced_memory()[1] < MUCH / 4
    finally:
        tracemalloc.stop()
