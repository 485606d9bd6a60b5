"""Share between linen and nnx: the call of each layer, a view of a whole model, and the tools over that view."""

try:
    import flax as flax
except ModuleNotFoundError as error:
    if error.name != "flax":
        raise
    raise ModuleNotFoundError(
        "`jaxbn.linen` and `jaxbn.nnx` need flax, which is not installed: `pip install jaxbn[flax]`.", name="flax"
    ) from None
