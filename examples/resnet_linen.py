"""Train a ResNet-20 in Flax linen, from the first batch to an exported program.

A complete training loop: a `TrainState` with batch statistics, SGD with momentum, warm-up and cosine decay, label
smoothing, weight decay that leaves out the scales and biases of the normalizations, one `jit` over all devices,
checkpoints with Orbax from which a run goes on where it stopped, an exponential moving average of the weights whose
batch statistics are computed afterwards, evaluation, folding of the normalizations into the convolutions, and
`jax.export`.

The batch is sharded over the devices and the state replicated. Batch normalization needs no argument for that: under
`jit` the statistics are those of the whole batch. On a machine without accelerators, simulate eight devices:

    python examples/resnet_linen.py
    JAX_NUM_CPU_DEVICES=8 python examples/resnet_linen.py --smoke

With `--smoke`, a few steps of a small network, the logits of the exported program differ from those of the model by
2e-7; this takes 14 seconds of CPU time on an Intel Xeon, most of it to compile. A run of five epochs, the default, is
drawn by `examples/figures/resnet20_mnist.py`.
"""

import operator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tyro
from flax.training import train_state
from images import Images, accuracy, batch_at, batches, load_images
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from networks.linen import ResNet, resnet20

import jaxbn.linen


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


class TrainState(train_state.TrainState):
    """Parameters and optimizer state, as flax has them; batch statistics; averaged parameters."""

    batch_stats: Any
    ema: Any


def create_state(model: ResNet, config: Config, images: np.ndarray) -> TrainState:
    """Return the state before the first step."""
    variables = model.init(jax.random.key(0), images[:1], train=False)
    rate = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, config.steps // 10, config.steps)
    decayed = jax.tree.map(operator.not_, jaxbn.linen.affine_mask(variables))
    optimizer = optax.chain(
        optax.add_decayed_weights(config.weight_decay, decayed), optax.sgd(rate, momentum=0.9, nesterov=True)
    )
    params, stats = variables["params"], variables["batch_stats"]
    return TrainState.create(apply_fn=model.apply, params=params, tx=optimizer, batch_stats=stats, ema=params)


def train_step(state: TrainState, batch: Images, ema: float) -> tuple[TrainState, jax.Array]:
    """Return the state after one step, and the loss before it."""

    def loss(params):
        variables = variables_of(state) | {"params": params}
        logits, new = state.apply_fn(variables, batch.x, train=True, mutable=["batch_stats"])
        targets = optax.smooth_labels(jax.nn.one_hot(batch.y, logits.shape[-1]), 0.1)
        return optax.softmax_cross_entropy(logits, targets).mean(), new["batch_stats"]

    (value, stats), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
    state = state.apply_gradients(grads=gradients, batch_stats=stats)
    return state.replace(ema=optax.incremental_update(state.params, state.ema, 1 - ema)), value


def main(config: Config) -> dict[str, Any]:
    """Train, evaluate, fold and export; return what was measured."""
    train, test = load_images()
    model = resnet20(dtype=jnp.bfloat16 if config.bfloat16 else None)
    if config.smoke:
        config, model = replace(config, steps=3, batch=16, save_every=1), model.clone(stages=(1, 1), width=4)
        train, test = Images(train.x[:64], train.y[:64]), Images(test.x[:64], test.y[:64])

    mesh = jax.make_mesh((config.devices or jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    everywhere, sharded = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    state = jax.jit(partial(create_state, model, config), out_shardings=everywhere)(train.x)
    step = jax.jit(train_step, out_shardings=everywhere, donate_argnums=0, static_argnums=2)
    predict = jax.jit(lambda variables, x: model.apply(variables, x, train=False))

    options = ocp.CheckpointManagerOptions(max_to_keep=2, save_interval_steps=config.save_every)
    folder = config.folder and config.folder.absolute()
    losses, curve = [], {}
    with nullcontext() if folder is None else ocp.CheckpointManager(folder, options=options) as manager:
        if manager is not None and manager.latest_step() is not None:
            state = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(state))
            print(f"goes on from step {state.step}")
        for i in range(int(state.step), config.steps):
            state, loss = step(state, jax.device_put(batch_at(train, i, config.batch), sharded), config.ema)
            losses.append(loss)
            if manager is not None:
                manager.save(i + 1, args=ocp.args.StandardSave(state), force=i + 1 == config.steps)
            if (i + 1) % (len(train.y) // config.batch) == 0:
                curve[i + 1] = accuracy(partial(predict, variables_of(state)), test)
                print(f"step {i + 1:4}, loss {loss:.3f}, test accuracy {curve[i + 1]:.3f}")

    # The averaged weights have no statistics of their own yet: pool them over some batches of the training images.
    def evaluate(variables, x):
        return model.apply(variables, x, train=False, mutable=["batch_stats"])

    some = [b.x for b in batches(Images(train.x[:1024], train.y[:1024]), 256)]
    averaged = jaxbn.linen.recalibrate(evaluate, variables_of(state) | {"params": state.ema}, some)
    averaged, x, folded_model = jax.device_get(averaged), test.x[:16], model.clone(folded=True)
    tolerance = 3e-2 if config.bfloat16 else 1e-4
    folded = jaxbn.linen.fold(evaluate, averaged, x, drop=True, tolerance=tolerance)

    # One file for any number of images, which holds the weights and runs without this code, flax and jaxbn.
    (b,) = jax.export.symbolic_shape("b")
    exported = jax.export.export(jax.jit(lambda x: folded_model.apply(folded, x, train=False)))(
        jax.ShapeDtypeStruct((b, *test.x.shape[1:]), np.float32)
    ).serialize()
    run = jax.export.deserialize(exported)

    result = {
        "test accuracy": accuracy(partial(predict, variables_of(state)), test),
        "test accuracy, averaged weights": accuracy(partial(predict, averaged), test),
        "test accuracy, exported": accuracy(run.call, test),
        "difference, exported": float(abs(run.call(x) - predict(averaged, x)).max()),
        "bytes, exported": len(exported),
    }
    print("\n".join(f"{name}: {value:.4g}" for name, value in result.items()))
    return result | {"losses": np.array(losses), "curve": curve, "state": state}


def variables_of(state: TrainState) -> dict[str, Any]:
    """Return the variables that linen's `apply` takes."""
    return {"params": state.params, "batch_stats": state.batch_stats}


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
