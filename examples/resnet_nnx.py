"""Train a ResNet-20 in Flax nnx: flax's own model, whose normalizations `jaxbn.nnx.convert` replaces.

The same loop as in `resnet_linen.py`: SGD with momentum, warm-up and cosine decay, label smoothing, weight decay that
leaves out the scales and biases of the normalizations, one `jit` over all devices, checkpoints with Orbax from which a
run goes on where it stopped, an exponential moving average of the weights whose batch statistics are computed
afterwards, evaluation, folding of the normalizations into the convolutions, and `jax.export`. The network in
`networks/nnx.py` does not mention jaxbn; one line below converts it, with its weights and statistics.

    python examples/resnet_nnx.py
    JAX_NUM_CPU_DEVICES=8 python examples/resnet_nnx.py --smoke

With `--smoke`, a few steps of a small network, the logits of the exported program differ from those of the model by
3e-7; this takes 19 seconds of CPU time on an Intel Xeon, most of it to compile.
"""

import operator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tyro
from flax import nnx
from images import Images, accuracy, batch_at, batches, load_images
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from networks.nnx import resnet20

import jaxbn.nnx


@dataclass(frozen=True)
class Config:
    """The settings of a run, each of them a flag."""

    steps: int = 310  # five epochs
    batch: int = 64
    learning_rate: float = 0.1
    weight_decay: float = 1e-4
    ema: float = 0.98
    devices: int | None = None  # all by default
    bfloat16: bool = False
    folder: Path | None = None  # for checkpoints, from which the run goes on; none by default
    save_every: int = 100
    smoke: bool = False  # a few steps of a small network


class Training(nnx.Module):
    """All that a step changes: the model, the same with averaged weights, and the optimizer."""

    def __init__(self, config: Config, **network: Any):
        """Make them as they are before the first step."""
        dtype = jnp.bfloat16 if config.bfloat16 else None
        self.model = jaxbn.nnx.convert(resnet20(channels=1, dtype=dtype, rngs=nnx.Rngs(0), **network))
        self.averaged = nnx.clone(self.model)
        rate = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, config.steps // 10, config.steps)
        decayed = jax.tree.map(operator.not_, jaxbn.nnx.affine_mask(self.model))
        optimizer = optax.chain(
            optax.add_decayed_weights(config.weight_decay, decayed), optax.sgd(rate, momentum=0.9, nesterov=True)
        )
        self.optimizer = nnx.Optimizer(self.model, optimizer, wrt=nnx.Param)


@nnx.jit(static_argnums=2)
def train_step(training: Training, batch: Images, ema: float) -> jax.Array:
    """Make one step in place, and return the loss before it."""

    def loss(model):
        logits = model(batch.x)
        targets = optax.smooth_labels(jax.nn.one_hot(batch.y, logits.shape[-1]), 0.1)
        return optax.softmax_cross_entropy(logits, targets).mean()

    value, gradients = nnx.value_and_grad(loss)(training.model)
    training.optimizer.update(training.model, gradients)
    new, old = nnx.state(training.model, nnx.Param), nnx.state(training.averaged, nnx.Param)
    nnx.update(training.averaged, optax.incremental_update(new, old, 1 - ema))
    return value


@nnx.jit
def predict(model: nnx.Module, x: np.ndarray) -> jax.Array:
    """Return the logits by the running statistics."""
    return nnx.view(model, use_running_average=True)(x)


def main(config: Config) -> dict[str, Any]:
    """Train, evaluate, fold and export; return what was measured."""
    train, test = load_images()
    network = {}
    if config.smoke:
        config, network = replace(config, steps=3, batch=16, save_every=1), {"stages": (1, 1), "width": 4}
        train, test = Images(train.x[:64], train.y[:64]), Images(test.x[:64], test.y[:64])

    mesh = jax.make_mesh((config.devices or jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    everywhere, sharded = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    training = nnx.jit(lambda: Training(config, **network), out_shardings=everywhere)()

    options = ocp.CheckpointManagerOptions(max_to_keep=2, save_interval_steps=config.save_every)
    folder, losses = config.folder and config.folder.absolute(), []
    with nullcontext() if folder is None else ocp.CheckpointManager(folder, options=options) as manager:
        if manager is not None and manager.latest_step() is not None:
            target = ocp.args.StandardRestore(nnx.to_pure_dict(nnx.state(training)))
            nnx.update(training, manager.restore(manager.latest_step(), args=target))
            print(f"goes on from step {training.optimizer.step[...]}")
        for i in range(int(training.optimizer.step[...]), config.steps):
            batch = jax.device_put(batch_at(train, i, config.batch), sharded)
            losses.append(train_step(training, batch, config.ema))
            if manager is not None:
                state = ocp.args.StandardSave(nnx.to_pure_dict(nnx.state(training)))
                manager.save(i + 1, args=state, force=i + 1 == config.steps)
            if (i + 1) % (len(train.y) // config.batch) == 0:
                found = accuracy(lambda x: predict(training.model, x), test)
                print(f"step {i + 1:4}, loss {losses[-1]:.3f}, test accuracy {found:.3f}")

    # The averaged weights have no statistics of their own yet: pool them over some batches of the training images.
    some = [b.x for b in batches(Images(train.x[:1024], train.y[:1024]), 256)]
    jaxbn.nnx.recalibrate(training.averaged, some)
    graph, state = nnx.split(training.averaged)
    averaged, x = nnx.merge(graph, jax.device_get(state)), test.x[:16]
    tolerance = 3e-2 if config.bfloat16 else 1e-4
    folded = jaxbn.nnx.fold(averaged, x, tolerance=tolerance)

    # One file for any number of images, which holds the weights and runs without this code, flax and jaxbn.
    (b,) = jax.export.symbolic_shape("b")
    exported = jax.export.export(jax.jit(folded))(jax.ShapeDtypeStruct((b, *test.x.shape[1:]), np.float32)).serialize()
    run = jax.export.deserialize(exported)

    result = {
        "test accuracy": accuracy(lambda x: predict(training.model, x), test),
        "test accuracy, averaged weights": accuracy(lambda x: predict(averaged, x), test),
        "test accuracy, exported": accuracy(run.call, test),
        "difference, exported": float(abs(run.call(x) - predict(averaged, x)).max()),
        "bytes, exported": len(exported),
    }
    print("\n".join(f"{name}: {value:.4g}" for name, value in result.items()))
    return result | {"losses": np.array(losses), "training": training}


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
