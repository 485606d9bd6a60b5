"""View an nnx model: the module, and a function that calls it.

In a copy of the model each normalization is of a subclass that reports its calls, so that layers keep their place,
their attributes and the variables they share, in compiled functions too.
"""

from collections.abc import Callable, Mapping
from functools import cache, partial
from types import new_class
from typing import Any, Generic, TypeVar

from flax import nnx

from jaxbn._flax.view import Call, Fold, Kind, check_array, check_function, make_call, make_row, unwrap_compiled
from jaxbn.lstm._state import LSTMState
from jaxbn.nnx._batch_norm import BatchNorm
from jaxbn.nnx._folded import Folded
from jaxbn.nnx._iter_norm import IterNorm
from jaxbn.nnx._lstm import BatchNormLSTMCell
from jaxbn.nnx._model import iter_layers, replace_modules

M = TypeVar("M")
_BATCH = (BatchNorm, nnx.BatchNorm)
_KINDS: dict[Any, Kind] = {nnx.BatchNorm: "batch", IterNorm: "whitening", BatchNormLSTMCell: "lstm"}


class NnxView(Generic[M]):
    """An nnx model as the tools see it; a copy of it in evaluation mode if it is to be used so."""

    def __init__(self, model: M, call: Callable[[Any, Any], Any], evaluating: bool = False):
        if evaluating:
            model = nnx.clone(model, graph=True)
            for module in iter_layers(model).values():
                module.eval()
        self.model = model
        self._call = check_function("call", call, nnx.Module, "lambda model, x: model(x)")
        self._layers = iter_layers(model)
        self.kernels = [path for path, layer in self._layers.items() if _has_kernel(layer)]
        self.kinds: dict[str, Kind] = {}
        self.epsilons: dict[str, float] = {}
        for path, layer in list(self._layers.items()):
            if kind := _find_kind(layer):
                for name in LSTMState._fields if kind == "lstm" else ("",):
                    at = "/".join(filter(None, (path, name)))
                    self._layers[at] = getattr(layer, name) if name else layer
                    self.kinds[at], self.epsilons[at] = kind, layer.epsilon
                    self.read(at, "mean")  # refuses a model without numbers before it is called

    def read(self, path: str, name: str) -> Any:
        """Return an array of a layer, or None; see `View`."""
        return _read_array(self._layers[path], name, path)

    def replace(self, arrays: Mapping[str, Mapping[str, Any]]) -> "NnxView[M]":
        """Return a copy with other arrays; see `View`."""
        copy = NnxView(nnx.clone(self.model, graph=True), self._call)
        copy.write(arrays)
        return copy

    def write(self, arrays: Mapping[str, Mapping[str, Any]]) -> None:
        """Set arrays of the model in place; a bias that a layer is without is made."""
        for path, values in arrays.items():
            layer = self._layers[path]
            for name, value in values.items():
                if getattr(layer, name, None) is not None:
                    getattr(layer, name).set_value(value)
                elif name == "bias":
                    layer.bias, layer.use_bias = nnx.Param(value), True

    def replace_folded(self, folds: Mapping[str, Fold], drop: bool) -> "NnxView[M]":
        """Return a copy with folded layers, a `Folded` for each normalization; see `View`. `drop` has no effect."""
        gone = {fold.norm: Folded(self._layers[fold.norm]) for fold in folds.values()}
        view = self.replace({layer: {"kernel": fold.kernel, "bias": fold.bias} for layer, fold in folds.items()})
        return NnxView(replace_modules(view.model, lambda path, _: gone.get(path)), self._call)

    def run(self, x: Any, observe: Any = None, after: Any = None) -> Any:
        """Call a copy of the model on `x`; see `View`."""
        copy = nnx.clone(self.model, graph=True)
        if observe is None:
            return self._call(copy, x)
        _report_calls(copy, observe, after)
        return unwrap_compiled(self._call)(copy, x)

    def compile_rows(self, observe: Any) -> Callable[[Mapping[str, Any], bool, Any], dict[str, Any]]:
        """Compile a pass over a batch; see `View`. Updates of the statistics are those of a copy."""
        view = self.replace({})
        layers = {path: view._layers[path] for path, kind in self.kinds.items() if kind == "batch"}
        for layer in layers.values():
            layer.jaxbn_moments = nnx.BatchStat(make_row(layer))
        _report_calls(view.model, observe)

        @nnx.jit
        def run(model, batch):
            self._call(model, batch)

        def rows_of(states, evaluate, batch):
            for path, layer in layers.items():
                layer.jaxbn_evaluate = evaluate
                layer.jaxbn_moments.set_value(make_row(states[path]))
            view.write({path: state._asdict() for path, state in states.items()})
            run(view.model, batch)
            return {path: layer.jaxbn_moments[...] for path, layer in layers.items()}

        return rows_of


def _report_calls(model: Any, observe: Any, after: Any = None) -> None:
    """Call `observe` instead of normalizations, and `after` after other layers with a kernel."""
    for path, layer in iter_layers(model).items():
        if _find_kind(layer) or (after is not None and _has_kernel(layer)):
            layer.__class__ = _make_reporting(type(layer))
            layer.jaxbn_report = partial(_report, observe, after, path)


def _report(observe: Any, after: Any, path: str, layer: Any, proceed: Any, args: Any, kwargs: Any) -> Any:
    proceed = partial(proceed, *args, **kwargs)
    kind = _find_kind(layer)
    if kind is None:
        y = proceed()
        after(path, layer, y)
        return y
    if kind != "batch":
        return observe(Call(path, kind, layer, proceed))
    moments = getattr(layer, "jaxbn_moments", None)
    row = None if moments is None else (moments[...], layer.jaxbn_evaluate)
    made = Call(path, kind, layer, proceed, row, moments and moments.set_value)
    return observe(make_call(made, partial(_read_array, layer), True, *args, **kwargs))


@cache
def _make_reporting(kind: Any) -> Any:
    """Make the subclass of `kind` whose calls are reported."""
    base = next((base for base in _BATCH if issubclass(kind, base)), kind)
    options = {"pytree": kind._pytree__is_pytree}
    if kind is not base:
        # After a user's subclass, which may change the input on its way.
        return new_class(kind.__name__, (kind, _make_reporting(base)), options)

    def call(self, *args, **kwargs):
        return self.jaxbn_report(self, partial(kind.__call__, self), args, kwargs)

    return new_class(kind.__name__, (kind,), options, lambda namespace: namespace.update(__call__=call))


def _find_kind(layer: Any) -> Kind | None:
    return next((kind for module, kind in _KINDS.items() if isinstance(layer, module)), None)


def _has_kernel(layer: Any) -> bool:
    return isinstance(getattr(layer, "kernel", None), nnx.Variable)


def _read_array(layer: Any, name: str, path: str = "") -> Any:
    variable = getattr(layer, name, None)
    return None if variable is None else check_array(path, name, variable.get_value())
