"""The trainer: arms start from the same weights, and neither devices nor padding change the training."""

import contextlib
import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_runs import ROOT, ROUNDING, digits, same, tiny, trajectory

from experiments.training import config, networks, parallel, train
from jaxbn import BatchNormState


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_both_arms_start_from_the_same_weights(model):
    """Every kernel is equal; the biases of normalized layers are left away."""
    settings, key = tiny(model=model, widths=(4,)), jax.random.key(3)
    kernels = []
    for norm in ("batch", "none"):
        params, _ = jax.jit(networks.build(settings, norm).init)(key)
        kernels.append([leaf for leaf in jax.tree.leaves(params) if leaf.ndim > 1])
    assert len(kernels[0]) == 2
    chex.assert_trees_all_equal(*kernels)
    assert np.std(kernels[0][0]) > 0


WAYS = [("jit", 2, 1), ("jit", 8, 2), ("explicit", 4, 1), ("explicit", 8, 4), ("shard_map", 8, 4), ("pmap", 8, 1)]
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("way", "devices", "groups"), [("shard_map", 8, 1), *(pytest.param(*w, marks=SLOW) for w in WAYS)]
)
def test_with_global_statistics_any_number_of_devices_trains_alike(way, devices, groups):
    """The losses, the accuracies, the parameters and the running statistics are those of one device under jit."""
    one, many = trajectory(way="jit", devices=1), trajectory(way=way, devices=devices, groups=groups)
    chex.assert_trees_all_close(many, one, **ROUNDING)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["jit", "explicit", "shard_map", "pmap"])
def test_a_padded_batch_trains_alike_on_eight_devices(way):
    """The batch has 61 examples and three that do not count: some devices count fewer than others."""
    padded = {"last_batch": "pad", "steps": 36, "log_every": 18}
    one, many = trajectory(way="jit", devices=1, **padded), trajectory(way=way, devices=8, **padded)
    chex.assert_trees_all_close(many, one, rtol=2e-5, atol=2e-5)
    assert not same(one, trajectory(way="jit", devices=1, steps=36, log_every=18), rtol=1e-3, atol=1e-3)


def test_what_pads_a_batch_does_not_count():
    """A step on a padded batch is that of its examples alone: parameters, statistics and loss, with any padding."""
    settings = tiny(way="jit", devices=1, batch_size=8, log_every=1, steps=1)
    model = networks.build(settings, "batch")
    short = train.compile_arm(dataclasses.replace(settings, batch_size=5), model)
    padded = train.compile_arm(settings, model)
    few = short.feed(0, digits())
    cut = [(0, 0), (0, 0), (0, 3)]
    more = few._replace(
        images=np.pad(few.images, [*cut, (0, 0)], constant_values=1e6),
        labels=np.pad(few.labels, cut),
        mask=np.ones((2, 1, 5), bool),
    )
    more = more._replace(mask=np.pad(more.mask, cut))
    made = [
        arm.step(arm.start(), np.int32(0), chunk, digits().validation) for arm, chunk in ((short, few), (padded, more))
    ]
    chex.assert_trees_all_close(made[1], made[0], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.compiler
@pytest.mark.parametrize("way", ["jit", "shard_map"])
def test_the_batch_is_really_divided(way):
    """The compiled program knows 37 examples, not all 74: else the agreement above would be that of copies."""
    settings = tiny(way=way, devices=2, batch_size=74, seeds=3, learning_rates=(0.1,))
    arm = train.compile_arm(settings, networks.build(settings, "batch"))
    chunk = arm.feed(0, digits())
    program = arm.step.lower(arm.start(), np.int32(0), chunk, digits().validation).compile().as_text() or ""
    assert re.search(r"f32\[[\d,]*\b37\b", program)
    assert not re.search(r"f32\[[\d,]*\b74\b", program)


@pytest.mark.slow
def test_the_cnn_trains_alike_on_eight_devices():
    """Train it by the linen module."""
    cnn = {"model": "cnn", "widths": (4,), "init": "he", "init_scale": 1.0, "learning_rates": (0.05, 0.2)}
    one, many = trajectory(way="jit", devices=1, **cnn), trajectory(way="shard_map", devices=8, **cnn)
    chex.assert_trees_all_close(many, one, **ROUNDING)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "statistics", "groups"),
    [
        ("jit", "per_device", 1),
        ("explicit", "per_device", 1),
        ("pmap", "per_device", 1),
        ("jit", "groups", 2),
        ("explicit", "groups", 2),
    ],
)
def test_all_ways_agree_on_statistics_of_parts_which_are_not_global_ones(way, statistics, groups):
    """So that the tests above can fail: the tolerance tells the two statistics apart."""
    scope = {"devices": 8, "statistics": statistics, "groups": groups}
    this, by_shard_map = (trajectory(way=w, **scope) for w in (way, "shard_map"))
    chex.assert_trees_all_close(by_shard_map, this, **ROUNDING)
    (state,) = this[2]
    assert state.mean.shape == (2, 2, 8 if groups == 1 else 2, 8)  # seeds, rates, parts, features
    assert np.median(np.std(state.mean, axis=2)) > 1e-3
    log, params, _ = this
    assert not same((log, params), trajectory(way="jit", devices=8)[:2], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "record_of", [lambda m, v: BatchNormState(m, v, jnp.full(2, 7)), lambda m, v: {"mean": m, "var": v}]
)
def test_states_of_devices_are_pooled_for_evaluation(record_of):
    """The variance between the devices counts: the law of total variance."""
    way = parallel.way(tiny(statistics="per_device", devices=2))
    state = {"layer": record_of(jnp.array([[0.0], [2.0]]), jnp.array([[1.0], [3.0]]))}
    pooled = parallel.pooled_state(way, state)["layer"]
    chex.assert_trees_all_close(pooled, jax.tree.map(jnp.asarray, _expected(pooled)), rtol=1e-6)


def _expected(like):
    """Mean (0 + 2) / 2, variance (1 + 3) / 2 + 1."""
    if isinstance(like, BatchNormState):
        return BatchNormState(jnp.array([1.0]), jnp.array([3.0]), jnp.array(7))
    return {"mean": jnp.array([1.0]), "var": jnp.array([3.0])}


def test_too_many_devices_are_refused_with_a_remedy():
    """JAX has started here, with eight."""
    with pytest.raises(ValueError, match=r"must not exceed the 8 cpu devices there are; got 9. Pass `--devices 8`"):
        parallel.require_devices(9)


@pytest.mark.parametrize(
    ("parts", "statistics"),
    [
        (16, "global"),
        pytest.param(2, "global", marks=pytest.mark.slow),
        pytest.param(16, "per_device", marks=pytest.mark.slow),
    ],
)
def test_ghost_batches_train_alike_in_both_ways(parts, statistics):
    """A number of them is of the whole batch: more than there are devices, or fewer."""
    given = {"norm": "ghost", "ghost_batches": parts, "devices": 4, "statistics": statistics, "learning_rates": (0.1,)}
    by_jit, by_shard_map = (trajectory(way=way, arms=("ghost",), **given) for way in ("jit", "shard_map"))
    chex.assert_trees_all_close(by_shard_map, by_jit, **ROUNDING)
    one = trajectory(way="jit", arms=("ghost",), **given | {"devices": 1, "statistics": "global"})
    # With statistics for each device evaluation is by what is pooled of them, and validation may differ.
    alike = slice(0, 2) if statistics == "global" else slice(1, 2)
    chex.assert_trees_all_close(by_jit[alike], one[alike], **ROUNDING)
    plain = trajectory(way="jit", **given | {"norm": "batch", "statistics": "global", "devices": 1})
    assert not same(plain[1], one[1], rtol=0, atol=1e-4)  # so that the tolerance above tells parts from the whole


def test_ghost_batches_of_a_config_are_valid_in_both_ways_or_in_none():
    ghost = config.load(ROOT / "configs" / "variants" / "ghost.toml").settings
    for parts in (1, 2, 4, 8, 16, 12):
        found = []
        for way in ("jit", "shard_map"):
            values = dataclasses.asdict(ghost) | {"ghost_batches": parts, "way": way, "devices": 8, "batch_size": 576}
            with contextlib.suppress(ValueError):
                config.settings(values, "here")
                found.append(way)
        assert found == ([] if parts == 12 else ["jit", "shard_map"])
