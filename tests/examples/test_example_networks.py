"""The networks of the examples: one set of weights, the same numbers in linen, nnx and PyTorch."""

import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util
from networks import linen
from networks import nnx as networks_nnx

import jaxbn.linen
import jaxbn.nnx
from jaxbn.convert import from_torch_network

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ordinary_promotion")]
RNG = np.random.default_rng(0)


def nnx_path(path: str) -> str:
    """Return the nnx name of a linen leaf."""
    return re.sub(r"layer(\d)_(\d)", r"layer\1/\2", path)


def flat_state(state: nnx.State) -> dict[str, np.ndarray]:
    return {"/".join(map(str, path)): np.asarray(v[...]) for path, v in nnx.to_flat_state(state)}


def flat_variables(variables) -> dict[str, np.ndarray]:
    return {nnx_path(k): np.asarray(v) for k, v in traverse_util.flatten_dict(variables, sep="/").items()}


@pytest.mark.parametrize(
    ("make", "make_nnx", "parameters"),
    [
        (linen.resnet20, partial(networks_nnx.resnet20, channels=3), None),
        (linen.resnet18, networks_nnx.resnet18, 11_689_512),
        (linen.resnet50, networks_nnx.resnet50, 25_557_032),
    ],
    ids=["resnet20", "resnet18", "resnet50"],
)
def test_both_have_the_same_parameters_and_as_many_as_torchvision(make, make_nnx, parameters):
    ours = jax.eval_shape(partial(make().init, train=False), jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
    theirs = nnx.eval_shape(lambda: make_nnx(rngs=nnx.Rngs(0)))
    shapes = {nnx_path(k): v.shape for k, v in traverse_util.flatten_dict(ours["params"], sep="/").items()}
    in_nnx = {"/".join(map(str, k)): v.shape for k, v in nnx.to_flat_state(nnx.state(theirs, nnx.Param))}
    assert shapes == in_nnx
    if parameters is not None:
        assert sum(int(np.prod(shape)) for shape in shapes.values()) == parameters


def test_resnet20_has_the_same_loss_gradients_and_statistics_in_both():
    x, y = RNG.standard_normal((4, 8, 8, 1)).astype(np.float32), jax.nn.one_hot(np.arange(4), 10)
    model, other = linen.resnet20(), jaxbn.nnx.convert(networks_nnx.resnet20(channels=1, rngs=nnx.Rngs(0)))
    shapes = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), x)
    weights = flat_state(nnx.state(other))
    flat = traverse_util.flatten_dict(shapes, sep="/")
    variables = {path: jnp.asarray(weights[nnx_path(path.partition("/")[2])]) for path in flat}
    variables = traverse_util.unflatten_dict(variables, sep="/")

    @jax.jit
    def linen_step(params, stats):
        def loss(params):
            out, new = model.apply({"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"])
            return -jnp.mean(nn.log_softmax(out) * y), new["batch_stats"]

        return jax.value_and_grad(loss, has_aux=True)(params)

    @nnx.jit
    def nnx_step(model):
        return nnx.value_and_grad(lambda model: -jnp.mean(nn.log_softmax(model(x)) * y))(model)

    (loss, stats), gradients = linen_step(variables["params"], variables["batch_stats"])
    other_loss, other_gradients = nnx_step(other)
    np.testing.assert_allclose(loss, other_loss, rtol=1e-5)
    for ours, theirs in (
        (flat_variables(gradients), flat_state(other_gradients)),
        (flat_variables(stats), flat_state(nnx.state(other, nnx.BatchStat))),
    ):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            np.testing.assert_allclose(value, theirs[name], atol=1e-4 * max(1, abs(value).max()), err_msg=name)


@pytest.mark.parametrize(("bottleneck", "small"), [(False, True), (True, False)], ids=["basic", "bottleneck"])
def test_logits_are_those_of_pytorch_also_folded_and_nearly_so_in_bfloat16(bottleneck, small):
    torch = pytest.importorskip("torch")
    from finetune_from_torch import torch_name
    from networks import pytorch

    torch.manual_seed(0)
    theirs = pytorch.ResNet((1, 2), 4, bottleneck, 1, 10, small)
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    x = RNG.standard_normal((2, 12, 12, 1)).astype(np.float32)
    wanted = theirs.eval()(torch.from_numpy(x.transpose(0, 3, 1, 2))).detach().numpy()

    model = linen.ResNet((1, 2), 4, bottleneck, 10, small)
    target = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), x)
    variables = from_torch_network(target, theirs.state_dict(), torch_name)
    options = {"bottleneck": bottleneck, "channels": 1, "classes": 10, "small_images": small}
    graph, state = nnx.split(networks_nnx.ResNet((1, 2), 4, **options, rngs=nnx.Rngs(0)))
    other = jaxbn.nnx.convert(nnx.merge(graph, from_torch_network(state, theirs.state_dict(), torch_name)))
    other.eval()

    def apply(variables, x):
        return model.apply(variables, x, train=False)

    folded = jaxbn.linen.fold(apply, variables, x, drop=True)
    assert "batch_stats" not in folded
    other_folded = jaxbn.nnx.fold(other, x)
    assert not any(isinstance(module, jaxbn.nnx.BatchNorm) for _, module in nnx.iter_modules(other_folded))
    for found in (
        apply(variables, x),
        other(x),
        model.clone(folded=True).apply(folded, x, train=False),
        other_folded(x),
    ):
        np.testing.assert_allclose(found, wanted, atol=1e-5)

    half = model.clone(dtype=jnp.bfloat16).apply(variables, x, train=False)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, wanted, atol=0.05 * abs(wanted).max())
    assert float(abs(half - wanted).max()) > 1e-4  # it did compute in half precision
