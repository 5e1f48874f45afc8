"""What is hidden may hold anything: it changes no result and no derivative of any order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flash_attention_jax import flash_attention

IMPLEMENTATIONS = ["xla", "reference"]
# Tiles of 520 or 528 positions: the last begins among those of the one before.
LENGTH = 1031


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def derivatives(attend, q, k, v):
    """Of the first two orders, in every order of modes: gradient, jvp, and products with the Hessian."""

    def loss(*arrays):
        out, lse = attend(*arrays)
        return jnp.sum(out**2) + jnp.sum(jnp.where(lse == -jnp.inf, 0, lse))

    gradient = jax.grad(loss, (0, 1, 2))
    moved = tuple(normal(*x.shape, seed=9 + i) for i, x in enumerate((q, k, v)))
    again = jax.grad(lambda *arrays: sum(jnp.sum(x**2) for x in gradient(*arrays)), (0, 1, 2))
    return {
        "gradient": gradient(q, k, v),
        "jvp": jax.jvp(attend, (q, k, v), moved)[1],
        "hvp": jax.jvp(gradient, (q, k, v), moved)[1],
        "reverse over reverse": again(q, k, v),
    }


def assert_as_with(anything, attend, q, k, v, keys):
    """Keys that nothing sees hold `anything`: every derivative is what it is with 0 there."""
    k0, v0 = (np.array(x) for x in (k, v))
    k0[keys], v0[keys] = 0, 0
    expected = derivatives(attend, q, k0, v0)
    for x in (k, v):
        x[keys] = anything
    found = derivatives(attend, q, k, v)
    for name in expected:
        for x, y in zip(jax.tree.leaves(found[name]), jax.tree.leaves(expected[name]), strict=True):
            np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-4, err_msg=name)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("anything", [np.nan, np.inf, 3e38])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_key_that_a_mask_hides(implementation, anything, softcap):
    q, k, v = normal(7, 4), normal(6, 4, seed=1), normal(6, 3, seed=2)
    kept = np.array([1, 1, 0, 1, 1, 1], bool)

    def attend(q, k, v):
        return flash_attention(q, k, v, kept, softcap=softcap, implementation=implementation)

    assert_as_with(anything, attend, q, k, v, 2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_keys_that_come_after_every_query(implementation):
    q, k, v = normal(5, 4), normal(9, 4, seed=1), normal(9, 4, seed=2)

    def attend(q, k, v):
        return flash_attention(q, k, v, causal=True, q_offset=0, implementation=implementation)

    assert_as_with(3e38, attend, q, k, v, slice(5, None))


@pytest.mark.parametrize("anything", [np.nan, 3e38])
@pytest.mark.parametrize("key", [3, 510, 1030])
def test_one_hidden_key_where_tiles_overlap(anything, key):
    q, k, v = normal(LENGTH, 4), normal(LENGTH, 4, seed=1), normal(LENGTH, 4, seed=2)
    kept = np.arange(LENGTH) != key

    def attend(q, k, v):
        return flash_attention(q, k, v, kept, implementation="xla")

    assert_as_with(anything, attend, q, k, v, key)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_only_queries_that_see_a_nan_get_one(implementation):
    q, k, v = normal(LENGTH, 4), normal(LENGTH, 4, seed=1), normal(LENGTH, 4, seed=2)
    k[520] = np.nan

    def loss(q):
        return flash_attention(q, k, v, causal=True, q_offset=-177, implementation=implementation).out.sum()

    poisoned = np.isnan(jax.grad(loss)(q)).any(-1)
    np.testing.assert_array_equal(poisoned, np.arange(LENGTH) - 177 >= 520)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("anything", [np.nan, np.inf])
def test_a_query_that_sees_nothing_enters_no_gradient_of_the_scale(implementation, anything):
    q, k, v = normal(5, 4), normal(5, 4, seed=1), normal(5, 4, seed=2)
    mask = np.ones((5, 5), bool)
    mask[2] = False

    def slope(q):
        def of(scale):
            return flash_attention(q, k, v, mask=mask, scale=scale, implementation=implementation).out.sum()

        return jax.grad(of)(jnp.float32(0.5))

    expected = slope(q)
    q[2] = anything
    np.testing.assert_allclose(slope(q), expected, rtol=1e-6)
