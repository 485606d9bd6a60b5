"""The claims on other images: files in the formats of MNIST and CIFAR-10, made up."""

import json
import struct
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.claims._lib import command, config
from experiments.interrupt import Interrupt

pytestmark = pytest.mark.usefixtures("ordinary_promotion")

ROOT = Path(__file__).parents[2]
CLAIMS = ROOT / "experiments" / "claims"
CONFIGS = config.load_all(CLAIMS)


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    """Make a folder with files in MNIST's format: 600 and 200 images that are noise around their digit's own."""
    folder, rng = tmp_path_factory.mktemp("mnist"), np.random.default_rng(0)
    own = rng.integers(0, 256, (10, 28 * 28))
    for name, count in (("train", 600), ("t10k", 200)):
        labels = np.arange(count) % 10
        images = (0.8 * own[labels] + rng.integers(0, 50, (count, 28 * 28))).astype(np.uint8)
        (folder / f"{name}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, count, 28, 28) + images.tobytes())
        head = struct.pack(">2i", 2049, count)
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(head + labels.astype(np.uint8).tobytes())
    return folder


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    """Make a folder with files in CIFAR-10's binary format: five of 60 images and one of 100."""
    folder, rng = tmp_path_factory.mktemp("cifar"), np.random.default_rng(0)
    own = rng.integers(0, 256, (10, 3 * 32 * 32))
    for name, count in (*((f"data_batch_{n}", 60) for n in range(1, 6)), ("test_batch", 100)):
        labels = np.arange(count) % 10
        images = 0.8 * own[labels] + rng.integers(0, 50, (count, 3 * 32 * 32))
        rows = np.concatenate([labels[:, None], images], 1).astype(np.uint8)
        (folder / f"{name}.bin").write_bytes(rows.tobytes())
    return folder


def test_files_become_three_parts(mnist):
    """A fifth of small files to validate and to test with, in the classes' proportions; nothing in two parts."""
    name, images, split = command.source(command.Command(mnist=mnist))
    assert split is None
    assert name == "mnist"
    parts = images[:3]
    assert [len(part.labels) for part in parts] == [480, 120, 40]
    for part in parts:
        assert np.array_equal(np.bincount(part.labels), np.full(10, len(part.labels) / 10))
        assert part.images.shape[1] == 784
        assert part.images.dtype == np.float32
        assert 0 <= part.images.min() < part.images.max() <= 1
    rows = [{row.tobytes() for row in part.images} for part in parts]
    assert not rows[0] & rows[1]


@pytest.fixture
def ordinary_promotion_in_threads():
    """JAX's own rules of promotion in the thread that measures, too: optax's Adam needs them."""
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    yield
    jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.mark.slow
@pytest.mark.usefixtures("ordinary_promotion_in_threads")
@pytest.mark.parametrize(
    ("name", "kind"), [(c.name, "mnist") for c in CONFIGS] + [("normalizes", "cifar"), ("small_batches", "cifar")]
)
def test_a_claim_is_measured_on_other_images(name, kind, request, tmp_path):
    folder = request.getfixturevalue(kind)
    given = ["--only", name, "--smoke", f"--{kind}", str(folder), "--out", str(tmp_path)]
    assert command.main(given, Interrupt()) == 0
    record = json.loads((tmp_path / name / "result.json").read_text())
    assert (record["data"], record["smoke"]) == (kind, True)
    page = (tmp_path / "index.md").read_text()
    assert f"Data: {kind}" in page
    assert "its numbers and verdicts mean nothing" in page
