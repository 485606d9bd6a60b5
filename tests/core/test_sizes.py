"""Exact at every size. Counts that are not powers of two make compilers fuse a quotient, rounded here and not there."""

import jax
import numpy as np
from oracle import training
from params import named, pairs

import jaxbn

RATIOS = np.array([0, 1e2, 1e4, 1e6, -3e5])
TRAIN = jax.jit(lambda x, mask: jaxbn.bn_apply(*jaxbn.bn_init(len(RATIOS)), x, True, mask=mask)[0])


@pairs("rows, masked", named(2, 3, 7, 39, 100, 999, 4097, 50001), named(False, True))
def test_output_is_exact(rows, masked):
    rng = np.random.default_rng(rows)
    x = (rng.standard_normal((rows, len(RATIOS))) + RATIOS).astype(np.float32)
    mask = (rng.random((rows, 1)) < 0.7) | (np.arange(rows) < 2)[:, None] if masked else np.ones((rows, 1), bool)
    exact = training(x, mask=mask).y
    for y in (TRAIN(x, mask if masked else None), jaxbn.bn_apply(*jaxbn.bn_init(5), x, True, mask=mask)[0]):
        # A unit in the last place of outputs of size 4 to 8, the largest of so many, and of what they are rounded from.
        np.testing.assert_allclose(np.where(mask, y, 0), np.where(mask, exact, 0), rtol=0, atol=2e-6)
