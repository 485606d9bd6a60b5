"""Compare random layers, drawn by a seed, with the float64 oracle.

    python tests/fuzz.py 1000 [first seed]

Of each layer the output, the new state, the first derivatives and one directional second derivative are compared. What
disagrees is shrunk: one option after the other is made plain as long as the disagreement stays.

Nearly all of the time is tracing and compiling. So each `SHARED` seeds are of one program, with other arrays: other
values, counts, masks, running statistics. A line in each hundred seeds says from which to go on after an interruption.
"""

import sys

import numpy as np
import oracle
from fuzz_layers import GROUPS, MEMBERS, PLAIN, Inputs, Layer, draw_layer, make_inputs
from fuzz_layers import SHARED as SHARED  # for laws/test_fuzz.py
from fuzz_programs import compute


def expect(layer: Layer, given: Inputs) -> dict[str, np.ndarray]:
    """Return what the oracle makes of a layer: each part of the rows that share statistics by itself."""
    members, rows = np.arange(32) // (32 // MEMBERS), np.arange(32)
    groups = [list(range(MEMBERS))] if layer.groups == "none" else GROUPS[layer.groups]
    axes = tuple(range(given.x.ndim - len(layer.features), given.x.ndim))
    zeros, found = np.zeros(given.x.shape), {}
    found["y"], found["dx"], found["ddx"] = zeros.copy(), zeros.copy(), zeros.copy()
    found["dscale"], found["dbias"] = np.zeros(layer.features), np.zeros(layer.features)
    found["mean"], found["var"] = np.zeros((32, *layer.features)), np.zeros((32, *layer.features))
    keep = {
        "zero_debiased": 0.9 * (1 - 0.9**given.count) / (1 - 0.9 ** (given.count + 1)),
        "cumulative_average": given.count / (given.count + 1),
    }.get(layer.momentum) or (0.0 if layer.momentum == "0.0" else 0.9)
    for group in groups:
        order = np.concatenate([rows[members == i] for i in group])
        mask = None if given.mask is None else np.broadcast_to(given.mask, given.x.shape)[order]
        clean = np.where(np.isnan(given.x), 0, given.x)
        whole = oracle.training(clean[order], axis=axes, mask=mask)
        seen = whole.count > 0
        for name, old, new in (("mean", given.mean, whole.mean), ("var", given.var, whole.var)):
            found[name][order] = np.where(seen, keep * old + (1 - keep) * new, old)
        for part in np.split(order, layer.ghost):
            own = None if given.mask is None else np.broadcast_to(given.mask, given.x.shape)[part]
            for name, value in _part(layer, given, clean[part], part, own, axes).items():
                if name in ("dscale", "dbias"):
                    found[name] += value
                else:
                    found[name][part] = value
    return found


def _part(layer, given: Inputs, x, rows, mask, axes) -> dict[str, np.ndarray]:
    """Return output and derivatives of rows that share statistics."""
    stats = oracle.training(x, axis=axes, mask=mask)
    std, running = np.sqrt(stats.var + oracle.EPSILON), np.sqrt(given.var + oracle.EPSILON)
    one, zero = np.ones(layer.features), np.zeros(layer.features)
    r, d = (
        (np.clip(std / running, 1 / 3, 3), np.clip((stats.mean - given.mean) / running, -5, 5))
        if layer.renorm
        else (one, zero)
    )
    r, d = np.where(stats.count > 0, r, 1), np.where(stats.count > 0, d, 0)
    scale, bias = one if given.scale is None else given.scale, zero if given.bias is None else given.bias
    counted = np.ones(x.shape, bool) if mask is None else mask

    def forward(x):
        unit = oracle.training(x, axis=axes, mask=mask).y
        unit = np.where(oracle.training(x, axis=axes, mask=mask).count > 0, unit, 0)
        z = scale * (unit * r + d) + bias + (0 if given.residual is None else given.residual[rows])
        act = {"none": lambda v: v, "tanh": np.tanh, "relu": lambda v: np.maximum(v, 0)}[layer.activation]
        slope = {"none": np.ones_like, "tanh": lambda v: 1 - np.tanh(v) ** 2, "relu": lambda v: (v > 0).astype(float)}
        return act(z), slope[layer.activation](z), unit

    _, slope_here, _ = forward(x)

    def gradient(x):
        _, slope, unit = forward(x)
        # The difference quotient below must not step over the kink of a ReLU, whose slope is constant on either side.
        slope = slope_here if layer.activation == "relu" else slope
        g = np.where(counted, given.dy[rows] * slope, 0)
        dx = oracle.gradients(x, g, scale * r, axis=axes, mask=mask)[0]
        return dx, (g * (unit * r + d)), g

    y, _, _ = forward(x)
    dx, of_scale, of_bias = gradient(x)
    step, moved = 1e-5, np.where(counted, given.direction[rows], 0)
    over = tuple(range(x.ndim - len(layer.features)))
    second = (gradient(x + step * moved)[0] - gradient(x - step * moved)[0]) / (2 * step)
    return {"y": y, "dx": dx, "ddx": second, "dscale": of_scale.sum(over), "dbias": of_bias.sum(over)}


def disagreements(layer: Layer, seed: int) -> dict[str, float]:
    """Return by how many times the tolerance each result is off, of those that are."""
    given = make_inputs(layer, seed)
    wanted, found = expect(layer, given), compute(layer, given, seed)
    counted = np.broadcast_to(True if given.mask is None else given.mask, given.x.shape)
    ulp = {"float32": 2.0**-23, "bfloat16": 2.0**-8, "float16": 2.0**-11}[layer.dtype]
    # Of what is of the size of one, and for derivatives times what few values, a small variance and a large mean cost.
    tolerance = {"y": 16, "mean": 0, "var": 0, "dx": 512, "ddx": 1e5, "dscale": 512, "dbias": 512}
    off, largest = {}, {"float16": 65504.0}.get(layer.dtype, np.inf)
    for name, value in found.items():
        want = np.where(counted, wanted[name], 0) if name in ("y", "dx", "ddx") else wanted[name]
        got = np.where(counted, value, 0) if name in ("y", "dx", "ddx") else value
        if name in ("y", "dx", "ddx"):  # of the layer's dtype: beyond its largest number lies infinity
            want, got = (np.clip(v, -largest, largest) for v in (want, got))
        # Where the residual cancels x_hat, the error of y is that of x_hat, which is as large as the residual.
        residual = np.max(np.abs(given.residual)) if name == "y" and given.residual is not None else 0.0
        size = float(max(1.0, np.max(np.abs(want)), residual))
        limit = (tolerance[name] * ulp + (1e-5 if name in ("mean", "var") else 0)) * size
        worst = float(np.max(np.abs(got - want))) if np.isfinite(got).all() else np.inf
        if not worst <= limit:
            off[name] = worst / limit
    return off


def shrink(layer: Layer, seed: int) -> Layer:
    """Return a layer that still disagrees, with as many options plain as can be."""
    for name, plain in PLAIN.items():
        simpler = layer._replace(**{name: plain})
        if name == "way" and layer.groups != "none":
            continue
        try:
            worse = simpler != layer and bool(disagreements(simpler, seed))
        except Exception:
            worse = False
        layer = simpler if worse else layer
    return layer


def run(seeds: range) -> list[str]:
    """Return a line for each seed whose layer disagrees."""
    failed = []
    for n, seed in enumerate(seeds, 1):
        layer = draw_layer(seed)
        try:
            off = disagreements(layer, seed)
        except Exception as error:
            off = {type(error).__name__ + ": " + str(error).splitlines()[0][:200]: np.inf}
        if off:
            failed.append(f"seed {seed}: {off}; shrunk: {shrink(layer, seed)}")
            print(failed[-1], flush=True)
        if n % 100 == 0:
            more = f"; go on by START={seed + 1} N={len(seeds) - n}" if n < len(seeds) else ""
            print(f"{n} of {len(seeds)} layers, {len(failed)} disagree{more}", flush=True)
    return failed


if __name__ == "__main__":
    import conftest  # noqa: F401  # eight devices, and little optimization
    import jax

    jax.config.update("jax_enable_compilation_cache", False)  # thousands of programs, each used once
    count, first = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    sys.exit(bool(run(range(first, first + count))))
