"""PyTorch as a second oracle: outputs, gradients and running statistics, with its conventions switched on.

Runs where torch is installed; the checks that every change must pass install it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from params import named, pairs

import jaxbn

torch = pytest.importorskip("torch")

# Statistics of some hundred values; gradients add as many terms again.
TOLERANCE = {np.float32: {"rtol": 2e-5, "atol": 2e-5}, np.float64: {"rtol": 1e-10, "atol": 1e-10}}
SHAPES, DTYPES = [(16, 3), (8, 3, 5), (6, 3, 4, 5)], named(np.float32, np.float64)


def layer(shape, dtype, **options):
    """Return a torch layer with parameters that are not trivial, and its like here."""
    kind = {2: torch.nn.BatchNorm1d, 3: torch.nn.BatchNorm1d, 4: torch.nn.BatchNorm2d}[len(shape)]
    module = kind(3, dtype=torch.float64 if dtype is np.float64 else torch.float32, **options)
    if module.affine:
        with torch.no_grad():
            module.weight.copy_(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
            module.bias.copy_(torch.tensor([0.1, 0.2, -0.3], dtype=torch.float64))
    scale, bias = ([1.0, -2.0, 0.5], [0.1, 0.2, -0.3]) if module.affine else (None, None)
    return module, jaxbn.bn_init(3, dtype=dtype, scale=scale, bias=bias)


def batches(shape, dtype, n):
    rng = np.random.default_rng(0)
    return [(rng.standard_normal(shape) * 3 + 2).astype(dtype) for _ in range(n)]


@pairs("shape, momentum, dtype, affine", named(*SHAPES), named(0.1, None), DTYPES, named(True, False))
def test_training_and_evaluation(shape, dtype, momentum, affine):
    with jax.enable_x64(dtype is np.float64):
        module, (params, state) = layer(shape, dtype, momentum=momentum, affine=affine)
        options = {
            "axis": 1,
            "momentum": jaxbn.cumulative_average if momentum is None else 1 - momentum,
            "unbiased_running_var": True,
        }
        for x in batches(shape, dtype, 4):
            theirs = module(torch.from_numpy(x)).detach().numpy()
            y, state = jaxbn.bn_apply(params, state, x, True, **options)
            np.testing.assert_allclose(y, theirs, **TOLERANCE[dtype])
        np.testing.assert_allclose(state.mean, module.running_mean.numpy(), **TOLERANCE[dtype])
        np.testing.assert_allclose(state.var, module.running_var.numpy(), **TOLERANCE[dtype])
        assert state.count == module.num_batches_tracked.item()
        module.eval()
        x = batches(shape, dtype, 1)[0]
        y, _ = jaxbn.bn_apply(params, state, x, False, **options)
        np.testing.assert_allclose(y, module(torch.from_numpy(x)).detach().numpy(), **TOLERANCE[dtype])


@pairs("shape, dtype, train", named(*SHAPES), DTYPES, named(True, False))
def test_gradients(shape, dtype, train):
    with jax.enable_x64(dtype is np.float64):
        module, (params, state) = layer(shape, dtype)
        module.train(train)
        x, g = batches(shape, dtype, 2)
        input_ = torch.from_numpy(x).requires_grad_()
        torch.relu(module(input_)).backward(torch.from_numpy(g))

        def f(params, x):
            return jaxbn.bn_apply(params, state, x, train, axis=1, activation=jax.nn.relu)[0]

        d_params, d_x = jax.vjp(f, params, jnp.asarray(x))[1](jnp.asarray(g))
        np.testing.assert_allclose(d_x, input_.grad.numpy(), **TOLERANCE[dtype])
        np.testing.assert_allclose(d_params.scale, module.weight.grad.numpy(), **TOLERANCE[dtype])
        np.testing.assert_allclose(d_params.bias, module.bias.grad.numpy(), **TOLERANCE[dtype])
