"""Fine-tune a ResNet that was trained in PyTorch, with frozen batch statistics.

`jaxbn.convert.from_torch_network` reads a `state_dict` into a Flax model by the names of its layers. The Flax ResNet
here has the names of torchvision's and timm's, up to separators, so that the one line of `torch_name` maps them. The
logits of both are compared. Then the head is replaced and the network is trained on few images. `frozen=True`
normalizes by the statistics from PyTorch in training, too, and leaves them as they are, as is usual for detection and
segmentation, whose batches hold one or two images; and the optimizer leaves scales and biases as they are.

    python examples/finetune_from_torch.py
    python examples/finetune_from_torch.py --no-frozen    # by the statistics of each batch of eight
    python -c "import torch, torchvision; \\
        torch.save(torchvision.models.resnet18(weights='DEFAULT').state_dict(), 'resnet18.pt')"
    python examples/finetune_from_torch.py --network resnet18 --weights resnet18.pt

Without weights the script first trains a small ResNet in PyTorch on the digits 0 to 4; it is fine-tuned on all ten, of
which it sees 320 images, three times.

Measured on two cores of an Intel Xeon, which other jobs used as well (20 seconds of CPU time each): the logits differ
by 4e-6, and the largest is 17. Test accuracy is 0.533 with frozen statistics and 0.815 without: after 60 steps on half
of the digits the statistics from PyTorch are not worth keeping. With frozen ones `--learning-rate 0.1` diverges.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import tyro
from images import Images, accuracy, batch_at, load_images
from networks import linen, pytorch

import jaxbn.linen
from jaxbn.convert import from_torch_network

NETWORKS: dict[str, dict[str, Any]] = {
    "small": {"stages": (1, 1, 1), "width": 16, "classes": 5, "small_images": True},
    "resnet18": {"stages": (2, 2, 2, 2)},
    "resnet50": {"stages": (3, 4, 6, 3), "bottleneck": True},
}


@dataclass(frozen=True)
class Config:
    """The settings of a run, each of them a flag."""

    network: Literal["small", "resnet18", "resnet50"] = "small"
    weights: Path | None = None  # a `state_dict` that `torch.save` has written; trained here by default
    frozen: bool = True
    steps: int = 120
    batch: int = 8
    images: int = 320
    learning_rate: float = 0.02
    torch_steps: int = 60
    smoke: bool = False  # a few steps of a small network


def torch_name(layer: str) -> str:
    """Map `layer1_0/downsample_bn`, or `layer1/0/downsample_bn` in nnx, to `layer1.0.downsample.1`."""
    return layer.replace("_conv", ".0").replace("_bn", ".1").replace("/", ".").replace("_", ".")


def state_dict_for_flax(network: torch.nn.Module) -> dict[str, Any]:
    """Return the `state_dict`, with the kernels of transposed convolutions as those of `ConvTranspose` in Flax.

    PyTorch has `[in, out, height, width]` and turns it by 180 degrees; a convolution has `[out, in, height, width]`.
    For PyTorch's `padding=p` give Flax `padding=k - 1 - p` on each side, with k the size of the kernel.
    """
    found = dict(network.state_dict())
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.ConvTranspose2d):
            found[f"{name}.weight"] = module.weight.detach().swapaxes(0, 1).flip(2, 3)
    return found


def train_in_torch(network: torch.nn.Module, data: Images, steps: int) -> None:
    """Train as PyTorch users do."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for i in range(steps):
        x, y = batch_at(data, i, 64)
        logits = network.train()(torch.from_numpy(x.transpose(0, 3, 1, 2)))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, torch.from_numpy(y).long()).backward()
        optimizer.step()


def main(config: Config) -> dict[str, Any]:
    """Convert, compare and fine-tune; return what was measured."""
    settings = dict(NETWORKS[config.network])
    if config.smoke:
        # Not narrower: with less than 16 channels PyTorch may hang in the gradient of the convolution of stride 2
        # (https://github.com/uxlfoundation/oneDNN/issues/6035).
        config, settings = replace(config, steps=3, torch_steps=3), settings | {"stages": (1, 1)}
    train, test = load_images()
    channels = 1 if config.network == "small" else 3
    train, test = (Images(np.repeat(data.x, channels, -1), data.y) for data in (train, test))

    torch.manual_seed(0)
    theirs = pytorch.ResNet(**settings, channels=channels)
    if config.weights is not None:
        theirs.load_state_dict(torch.load(config.weights, weights_only=True))
    else:
        some = train.y < settings["classes"]
        train_in_torch(theirs, Images(train.x[some], train.y[some]), config.torch_steps)

    # The same network and the same logits in both.
    model, x = linen.ResNet(**settings, frozen=config.frozen), test.x[:16]
    target = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), x)
    variables = from_torch_network(target, state_dict_for_flax(theirs), torch_name)
    with torch.no_grad():
        wanted = theirs.eval()(torch.from_numpy(x.transpose(0, 3, 1, 2))).numpy()
    difference = float(abs(model.apply(variables, x, train=False) - wanted).max())
    print(f"largest difference of logits: {difference:.2g}, of {abs(wanted).max():.2g}")

    # A new head for ten classes; the rest is from PyTorch.
    model = model.clone(classes=10)
    fresh = jax.jit(partial(model.init, train=False))(jax.random.key(0), x)
    params, stats = {**variables["params"], "fc": fresh["params"]["fc"]}, variables["batch_stats"]
    affine = jaxbn.linen.affine_mask({"params": params, "batch_stats": stats})
    rate = optax.cosine_decay_schedule(config.learning_rate, config.steps)
    optimizer = optax.chain(optax.sgd(rate, momentum=0.9), optax.masked(optax.set_to_zero(), affine))

    @partial(jax.jit, donate_argnums=0)
    def step(carry, batch):
        params, stats, moments = carry

        def loss(params):
            variables = {"params": params, "batch_stats": stats}
            logits, new = model.apply(variables, batch.x, train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch.y).mean(), new["batch_stats"]

        (value, new), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        updates, moments = optimizer.update(gradients, moments, params)
        return (optax.apply_updates(params, updates), new, moments), value

    few, losses = Images(train.x[: config.images], train.y[: config.images]), []
    carry = jax.tree.map(jnp.copy, (params, stats, optimizer.init(params)))
    for i in range(config.steps):
        carry, loss = step(carry, batch_at(few, i, config.batch))
        losses.append(float(loss))
    tuned = {"params": carry[0], "batch_stats": carry[1]}
    found = accuracy(jax.jit(lambda x: model.apply(tuned, x, train=False)), test)
    print(f"loss {losses[0]:.3f} before, {np.mean(losses[-20:]):.3f} in the last steps; test accuracy {found:.3f}")
    return {"difference": difference, "losses": losses, "accuracy": found, "before": (params, stats), "after": tuned}


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
