"""Train a batch-normalized LSTM on sequences of different lengths.

`jaxbn.linen.BatchNormLSTMCell` (Cooijmans et al. 2017) keeps running statistics for each time step. Its sequences are
padded to one length, and `seq_lengths` says where each ends: padding enters no statistic, and `carry.h` is the
state at each sequence's own end. Few sequences reach the late steps; `jaxbn.zero_debiased` makes their statistics
right from the first update.

The data are JapaneseVowels of the UCI archive: nine speakers, 270 utterances to train on and 370 to test on, of 7 to
29 frames with 12 features. The package `aeon` carries them (`pip install --no-deps aeon` is enough). Where it is
absent, the sequences are the first rows, from five to eight, of scikit-learn's digits.

    python examples/lstm_lengths.py

Measured on two cores of an Intel Xeon, which other jobs used as well (14 seconds of CPU time), on JapaneseVowels: 97.6%
of the test utterances are classified correctly after 30 epochs.
"""

from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax
import tyro

import jaxbn.linen


@dataclass(frozen=True)
class Config:
    """The settings of a run, each of them a flag."""

    epochs: int = 30
    batch: int = 27
    hidden: int = 64
    learning_rate: float = 3e-3
    seed: int = 0
    smoke: bool = False  # a few steps of a small network


class Sequences(NamedTuple):
    """Sequences `[n, time, features]` with padding at their ends, their lengths `[n]`, and labels `[n]`."""

    x: np.ndarray
    lengths: np.ndarray
    y: np.ndarray


def read_ts(path: Path) -> Sequences:
    """Read a file of aeon's format: a line a sequence, features between colons, labels from 1 at the end."""
    lines = path.read_text().partition("@data\n")[2].splitlines()
    rows = [line.split(":") for line in lines if line.strip()]
    found = [np.array([feature.split(",") for feature in row[:-1]], np.float32).T for row in rows]
    x = np.zeros((len(found), max(map(len, found)), found[0].shape[1]), np.float32)
    for i, sequence in enumerate(found):
        x[i, : len(sequence)] = sequence
    return Sequences(x, np.array([len(s) for s in found], np.int32), np.array([int(row[-1]) - 1 for row in rows]))


def load_sequences() -> tuple[Sequences, Sequences]:
    """Return training and test sequences."""
    aeon = find_spec("aeon")
    if aeon is not None and aeon.origin is not None:
        folder = Path(aeon.origin).parent / "datasets/data/JapaneseVowels"
        return read_ts(folder / "JapaneseVowels_TRAIN.ts"), read_ts(folder / "JapaneseVowels_TEST.ts")
    return load_digit_rows()


def load_digit_rows() -> tuple[Sequences, Sequences]:
    """Return the digits of scikit-learn row by row, cut off after five to eight rows."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x, lengths = x.reshape(-1, 8, 8).astype(np.float32) / 16, np.random.default_rng(0).integers(5, 9, len(y))
    x = np.where(np.arange(8)[None, :, None] < lengths[:, None, None], x, np.float32(0))
    every = Sequences(x, lengths.astype(np.int32), y)
    return Sequences(*(v[450:] for v in every)), Sequences(*(v[:450] for v in every))


class Classifier(nn.Module):
    """The LSTM, and a dense layer on its last output."""

    hidden: int
    max_steps: int
    classes: int

    @nn.compact
    def __call__(self, x: jax.Array, lengths: jax.Array, train: bool) -> jax.Array:
        """Return the logits `[n, classes]` of sequences `[n, time, features]`."""
        # Training carries the statistics from step to step. Flax carries mutable variables only.
        how = {"variable_carry": "batch_stats"} if train else {"variable_broadcast": ("params", "batch_stats")}
        cell = jaxbn.linen.BatchNormLSTMCell(
            self.hidden, self.max_steps, use_running_average=not train, momentum=jaxbn.zero_debiased(0.9), name="cell"
        )
        carry, _ = nn.RNN(cell, return_carry=True, **how)(x, seq_lengths=lengths)
        return nn.Dense(self.classes)(carry.h)


def main(config: Config, data: tuple[Sequences, Sequences] | None = None) -> dict[str, Any]:
    """Train and evaluate; return what was measured."""
    train, test = load_sequences() if data is None else data
    if config.smoke:
        config = replace(config, epochs=1, batch=16, hidden=8)
        train, test = (Sequences(*(v[::8] for v in s)) for s in (train, test))
    longest = max(train.x.shape[1], test.x.shape[1])
    model = Classifier(config.hidden, longest, int(max(train.y.max(), test.y.max())) + 1)
    steps = config.epochs * (len(train.y) // config.batch)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(config.learning_rate, steps))
    )

    @partial(jax.jit, donate_argnums=0)
    def step(carry, batch):
        params, stats, moments = carry

        def loss(params):
            variables = {"params": params, "batch_stats": stats}
            logits, new = model.apply(variables, batch.x, batch.lengths, train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch.y).mean(), new["batch_stats"]

        (value, new), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        updates, moments = optimizer.update(gradients, moments, params)
        return (optax.apply_updates(params, updates), new, moments), value

    init = jax.jit(partial(model.init, train=False))
    variables = init(jax.random.key(config.seed), train.x[:1], train.lengths[:1])
    carry, losses = (variables["params"], variables["batch_stats"], optimizer.init(variables["params"])), []
    predict = jax.jit(lambda variables, data: model.apply(variables, data.x, data.lengths, train=False).argmax(-1))
    found = 0.0
    for epoch in range(config.epochs):
        order = np.random.default_rng((config.seed, epoch)).permutation(len(train.y))
        for i in range(0, len(order) - config.batch + 1, config.batch):
            carry, loss = step(carry, Sequences(*(v[order[i : i + config.batch]] for v in train)))
            losses.append(float(loss))
        if epoch % 5 == 4 or epoch == config.epochs - 1:
            found = float(np.mean(predict({"params": carry[0], "batch_stats": carry[1]}, test) == test.y))
            print(f"epoch {epoch + 1:3}, loss {losses[-1]:.3f}, test accuracy {found:.3f}")
    return {"losses": losses, "accuracy": found, "batch_stats": carry[1]}


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
