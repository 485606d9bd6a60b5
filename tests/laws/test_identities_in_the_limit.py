"""Laws of large numbers: true of the given seeds to the digits that chance leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from law_cases import NONE, VANISHING, compiled, fresh

import jaxbn

pytestmark = pytest.mark.usefixtures("float64")


def test_mean_deviation_of_a_gaussian():
    """E|x - mean| sqrt(pi / 2) is the standard deviation of a Gaussian, and of a uniform it is 8.5% more."""
    rng, n = np.random.default_rng(0), 2**16
    y, _ = jaxbn.bn_apply(NONE, fresh(2), np.stack([rng.normal(7, 3, n), rng.uniform(7, 9, n)], 1), True)
    found = np.abs(y).mean(0) * np.sqrt(np.pi / 2)
    # The quotient of both estimates has a variance of (pi - 3) / 2n; five of its standard deviations.
    tolerance = 5 * np.sqrt((np.pi - 3) / 2 / n)
    np.testing.assert_allclose(found, [1, np.sqrt(3 * np.pi / 8)], rtol=tolerance)
    assert found[1] > 1 + 10 * tolerance


@compiled("depth", "relu")
def gradient_norms(x, weights, dy, depth, relu):
    """|gradient|^2 with respect to the input of each normalization of a deep network, `[seeds, depth]`."""
    rows, width = x.shape[1:]

    def network(shifts, x, weights):
        def block(x, given):
            weight, shift = given
            options = {"activation": jax.nn.relu} if relu else {}
            return jaxbn.bn_apply(NONE, fresh(width), x @ weight + shift, True, epsilon=VANISHING, **options)[0], None

        return lax.scan(block, x, (weights, shifts))[0]

    def squares(x, weights, dy):
        shifts = jnp.zeros((depth, rows, width))
        return jnp.sum(jax.grad(lambda v: jnp.sum(dy * network(v, x, weights)))(shifts) ** 2, (1, 2))

    return jax.vmap(squares)(x, weights, dy)


@pytest.mark.parametrize(("relu", "rows"), [(True, 8), (False, 32)])
def test_gradients_grow_backwards(rows, relu):
    """From the output down, |gradient|^2 grows at each layer by a factor that depends on the batch size alone.

    It is `(m - 1) (J'(c) + m - 1) / ((m - 3) (m - 1) (1 - J(c))) - 1 / (m - 3)` with c = -1 / (m - 1), and
    `(m - 2) / (m - 3)` without ReLU, for wide layers (Yang et al. 2019, "A mean field theory of batch normalization",
    theorems 8 and 9; J and J' are how the correlation of two rows goes through a ReLU).
    """
    seeds, depth, width, m = 4, 24, 128, rows
    rng = np.random.default_rng(rows)
    x, dy = rng.normal(size=(2, seeds, m, width))
    weights = rng.normal(size=(seeds, depth, width, width))
    norms = gradient_norms(x, weights, dy, depth, relu)
    angle = np.arccos(-1 / (m - 1))
    slope = (np.pi - angle) / np.pi
    j = np.sin(angle) / np.pi - slope / (m - 1)
    wanted = (m - 2) / (m - 3)
    if relu:
        wanted = (m - 1) * (slope + m - 1) / ((m - 3) * (m - 1) * (1 - j)) - 1 / (m - 3)
    # Without the layers near either end, which are still on their way to the limit.
    found = np.exp(np.mean(np.log(norms[:, 4] / norms[:, -4])) / (depth - 8))
    # Width 128 and four seeds leave 1 to 3%.
    assert found == pytest.approx(wanted, rel=0.05)
