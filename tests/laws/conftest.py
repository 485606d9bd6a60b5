"""Float64 for the tests of exact laws."""

import jax
import pytest


@pytest.fixture(scope="module")
def float64():
    """Enable float64 in all tests of a file."""
    with jax.enable_x64(True):
        yield
