"""Fine-tuning from PyTorch, where that is installed."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from jaxbn.convert import from_torch_network
from jaxbn.linen import affine_mask

torch = pytest.importorskip("torch")
finetune = pytest.importorskip("finetune_from_torch")
pytorch = pytest.importorskip("networks.pytorch")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ordinary_promotion")]


def test_frozen_statistics_scales_and_biases_stay_as_they_are_in_pytorch():
    found = finetune.main(finetune.Config(smoke=True))
    assert found["difference"] < 1e-4
    (params, stats), after = found["before"], found["after"]
    jax.tree.map(np.testing.assert_array_equal, after["batch_stats"], stats)
    for affine, old, new in zip(*map(jax.tree.leaves, (affine_mask(after), params, after["params"])), strict=True):
        assert affine == np.array_equal(old, new)


def test_weights_come_from_a_file_and_the_statistics_follow_the_images_unless_frozen(tmp_path):
    torch.manual_seed(1)
    network = pytorch.ResNet((1, 1), 16, channels=1, classes=5, small_images=True)
    network(torch.randn(8, 1, 8, 8))
    torch.save(network.state_dict(), tmp_path / "saved.pt")
    found = finetune.main(finetune.Config(smoke=True, weights=tmp_path / "saved.pt", frozen=False))
    assert found["difference"] < 1e-4
    params, stats = found["before"]
    kernel = network.conv1.weight.detach().numpy().transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(params["conv1"]["kernel"], kernel)
    np.testing.assert_array_equal(stats["bn1"]["mean"], network.bn1.running_mean.numpy())
    assert abs(found["after"]["batch_stats"]["bn1"]["mean"] - stats["bn1"]["mean"]).max() > 1e-3


@pytest.mark.parametrize(("size", "stride", "padding"), [(3, 2, 1), (4, 2, 1), (3, 1, 0)])
def test_transposed_kernels_give_what_they_give_in_pytorch(size, stride, padding):
    layer = torch.nn.ConvTranspose2d(2, 3, size, stride, padding)
    x = np.random.default_rng(0).standard_normal((2, 5, 5, 2)).astype(np.float32)
    wanted = layer(torch.from_numpy(x.transpose(0, 3, 1, 2))).detach().numpy().transpose(0, 2, 3, 1)
    pad = (size - 1 - padding,) * 2
    model = nn.Sequential([nn.ConvTranspose(3, (size, size), (stride, stride), (pad, pad))])
    target = jax.eval_shape(model.init, jax.random.key(0), x)
    state = finetune.state_dict_for_flax(torch.nn.Sequential(layer))
    variables = from_torch_network(target, state, {"layers_0": "0"})
    np.testing.assert_allclose(model.apply(variables, x), wanted, atol=1e-5)
