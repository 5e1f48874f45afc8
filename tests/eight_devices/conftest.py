"""Eight CPU devices, set before anything is computed."""

import re

import jax
import pytest
from jax.sharding import AxisType

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture
def mesh():
    """Two by four devices, divided by the partitioner."""
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


@pytest.fixture
def explicit_mesh():
    """Two by four devices, in the types of arrays."""
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)


@pytest.fixture
def ring():
    """All eight devices in a row."""
    return jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))


@pytest.fixture
def quickly_compiled():
    """A third of the compiler's work on these many programs goes into making them fast."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def collectives():
    """A function from a compiled program to how often each collective stands in it."""
    names = ("all-gather", "all-to-all", "collective-permute", "reduce-scatter")

    def count(compiled):
        text = compiled.as_text()
        found = {name: len(re.findall(rf"= [^=]*\b{name}(?:-start)?\(", text)) for name in names}
        return {name: n for name, n in found.items() if n}

    return count
