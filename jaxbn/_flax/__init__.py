"""What the linen and nnx modules share."""

try:
    import flax as flax
except ModuleNotFoundError as error:
    if error.name != "flax":
        raise
    raise ModuleNotFoundError(
        "`jaxbn.linen` and `jaxbn.nnx` need flax, which is not installed: `pip install jaxbn[flax]`.", name="flax"
    ) from None
