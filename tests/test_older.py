"""The names of flash-attention-jax 0.3.1: what they meant, and what went wrong there."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flash_attention_jax as package
from flash_attention_jax import flash_attention, value_and_grad_difference
from flash_attention_jax._api import attention_and_lse
from flash_attention_jax.testing import Case, error, evaluate

NAMES = {
    "causal_flash_attention": (),
    "cosine_sim_flash_attention": ("key_mask",),
    "rabe_attention": (),
    "plain_attention": ("key_mask",),
    "causal_attention": (),
    "cosine_sim_attention": ("key_mask",),
}
RNG = np.random.default_rng(0)
Q, K, V = (RNG.standard_normal((2, 3, n, 16)).astype(np.float32) for n in (37, 53, 53))
KEY_MASK = RNG.random((2, 53)) < 0.7


def arguments(name):
    return (Q, K, V) + (KEY_MASK,) * len(NAMES[name])


def out_of(result):
    return result[0] if isinstance(result, tuple) else result


def defined(name, q, k, v, key_mask=None):
    """out by the formulas of that package's attention.py, in float64, the norms by vector."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5
    if "cosine" in name:
        q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
        scale = 10
    logits = scale * q @ k.swapaxes(-1, -2)
    t, s = logits.shape[-2:]
    if key_mask is not None:
        logits = np.where(key_mask[..., None, None, :], logits, -np.inf)
    if "causal" in name:
        logits = np.where(np.triu(np.ones((t, s)), s - t + 1), -np.inf, logits)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


@pytest.mark.parametrize("name", NAMES)
def test_each_name_means_what_it_meant(name):
    function = getattr(package, name)
    assert name in package.__all__
    assert list(inspect.signature(function).parameters)[: 3 + len(NAMES[name])] == [
        "q",
        "k",
        "v",
        *NAMES[name],
    ]
    result = function(*arguments(name))
    assert isinstance(result, package.AttentionOutput if "flash" in name else jax.Array)
    np.testing.assert_allclose(out_of(result), defined(name, *arguments(name)), atol=2e-6)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_formula(name):
    function = getattr(package, name)
    weights = RNG.standard_normal(Q.shape).astype(np.float32)
    direction = [RNG.standard_normal(x.shape).astype(np.float32) for x in (Q, K, V)]
    mask = arguments(name)[3:]

    def loss(q, k, v):
        return jnp.sum(out_of(function(q, k, v, *mask)) * weights)

    gradients = jax.grad(loss, (0, 1, 2))(Q, K, V)
    slope = sum(float(np.sum(np.float64(g) * d)) for g, d in zip(gradients, direction, strict=True))
    step = 1e-4
    high, low = (
        np.sum(
            defined(name, *(np.float64(x) + h * d for x, d in zip((Q, K, V), direction, strict=True)), *mask)
            * weights
        )
        for h in (step, -step)
    )
    np.testing.assert_allclose(slope, (high - low) / (2 * step), rtol=1e-4)


def test_the_sanity_check_of_its_readme():
    diff, gradients = value_and_grad_difference(package.plain_attention, flash_attention, 42, 200, 300, 64)
    assert diff < 1e-5
    assert max(gradients) < 1e-5


@pytest.mark.parametrize("name", [name for name in NAMES if "flash" in name])
def test_out_and_another_as_its_readme_had_it(name):
    out, _ = getattr(package, name)(Q[0, 0], K[0, 0], V[0, 0])
    assert out.shape == Q[0, 0].shape


@pytest.mark.parametrize("lengths", [(1500, 1500), (1024, 1500), (1500, 2048)], ids=str)
@pytest.mark.parametrize("name", ["causal_flash_attention", "cosine_sim_flash_attention", "rabe_attention"])
def test_lengths_that_are_no_multiple_of_1024(name, lengths):
    """There such a query length raised, and such a key length gave wrong results."""
    t, s = lengths
    q, k, v = (RNG.standard_normal((n, 8)).astype(np.float32) for n in (t, s, s))
    np.testing.assert_allclose(out_of(getattr(package, name)(q, k, v)), defined(name, q, k, v), atol=2e-6)


@pytest.mark.parametrize("shape", [(9, 4), (2, 5, 3, 9, 4)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_number_of_axes_a_value_dim_of_its_own_and_shared_key_heads(name, shape):
    q, k = (RNG.standard_normal((*shape[:-2], n, 4)).astype(np.float32) for n in (9, 12))
    k = k[..., :1, :, :] if len(shape) > 2 else k
    v = RNG.standard_normal((*k.shape[:-1], 6)).astype(np.float32)
    out = out_of(getattr(package, name)(q, k, v))
    assert out.shape == (*q.shape[:-1], 6)
    np.testing.assert_allclose(out, defined(name, q, k, v), atol=2e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_the_dtype_stays(name, dtype):
    """There the flash functions gave float32 for 16-bit floats."""
    q, k, v = (x.astype(dtype) for x in (Q, K, V))
    out = out_of(getattr(package, name)(q, k, v, *arguments(name)[3:]))
    assert out.dtype == dtype
    exact = defined(name, q, k, v, *arguments(name)[3:])
    assert np.abs(np.float64(out) - exact).max() < 4 * float(jnp.finfo(dtype).eps) * np.abs(exact).max()


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64])
@pytest.mark.parametrize("name", NAMES)
def test_promotion_of_dtypes_may_be_strict(name, dtype):
    with jax.enable_x64(True):
        q, k, v = (jnp.asarray(x, dtype) for x in (Q, K, V))

        def loss(*x):
            return out_of(getattr(package, name)(*x, *arguments(name)[3:])).sum()

        expected = jax.value_and_grad(loss, (0, 1, 2))(q, k, v)
        with jax.numpy_dtype_promotion("strict"):
            found = jax.value_and_grad(loss, (0, 1, 2))(q, k, v)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("name", ["cosine_sim_attention", "plain_attention"])
def test_a_query_that_sees_no_key_gets_0(name):
    """There the plain functions gave it the mean of v."""
    assert not np.any(getattr(package, name)(Q, K, V, np.zeros(53, bool)))


# The norms.


def test_a_norm_is_that_of_one_vector_whatever_its_size():
    """There it was that of the whole array, and of half precision when the array was."""
    expected = package.cosine_sim_attention(Q, K, V)
    sizes = np.exp(RNG.uniform(-40, 40, (2, 3, 53, 1))).astype(np.float32)
    np.testing.assert_allclose(package.cosine_sim_attention(Q, K * sizes, V), expected, atol=2e-6)
    half = [x.astype(np.float16) for x in (Q * 1000, K, V)]
    assert np.isfinite(package.cosine_sim_attention(*half)).all()
    assert np.abs(np.float32(package.cosine_sim_attention(*half)) - expected).max() < 2e-2


@pytest.mark.parametrize("name", ["cosine_sim_attention", "cosine_sim_flash_attention"])
def test_a_vector_of_zeros_has_finite_gradients(name):
    q = Q.copy()
    q[:, :, 5] = 0

    def loss(q, k, v):
        return jnp.sum(out_of(getattr(package, name)(q, k, v)) ** 2)

    for gradient in jax.grad(loss, (0, 1, 2))(q, K, V):
        assert np.isfinite(gradient).all()
    mean = out_of(getattr(package, name)(q, K, V))[:, :, 5]
    np.testing.assert_allclose(mean, V.mean(-2), atol=1e-6)


@pytest.mark.parametrize("name", ["cosine_sim_attention", "cosine_sim_flash_attention"])
def test_hidden_keys_may_hold_anything(name):
    def loss(k, v):
        return jnp.sum(out_of(getattr(package, name)(Q, k, v, KEY_MASK)) ** 2)

    k, v = K.copy(), V.copy()
    k[0, :, ~KEY_MASK[0]], v[0, :, ~KEY_MASK[0]] = np.nan, np.inf
    for actual, expected in zip(jax.grad(loss, (0, 1))(k, v), jax.grad(loss, (0, 1))(K, V), strict=True):
        np.testing.assert_array_equal(actual, expected)


CASE = Case("older-cosine", (2, 3, 37, 16), (2, 3, 53, 16), (2, 3, 53, 16), key_mask=(2, 53))


def test_cosine_sim_flash_attention_is_within_its_budget():
    """Twice the error of the plain formula of unit vectors, differentiated by JAX, and two roundings."""

    def formula(q, k, v, key_mask):
        q, k = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
        return attention_and_lse(q, k, v, key_mask, scale=10.0)

    exact, plain = evaluate(formula, CASE, "float64"), evaluate(formula, CASE)
    for name, actual in evaluate(package.cosine_sim_flash_attention, CASE).items():
        rounding = 2**-23 * np.abs(exact[name]).max()
        assert error(actual, exact[name]) <= 2 * error(plain[name], exact[name]) + 2 * rounding, name


# Errors.


@pytest.mark.parametrize("name", NAMES)
def test_errors_are_those_of_flash_attention(name):
    function = getattr(package, name)
    with pytest.raises(TypeError, match=r"^k must be a JAX or NumPy array, got builtins.list$"):
        function(Q, [1.0], V)
    with pytest.raises(TypeError, match=r"^q must be of dtype .*, got int32$"):
        function(Q.astype(np.int32), K, V)
    with pytest.raises(ValueError, match=r"^v must be of k's heads and length \(K, S\) = \(3, 53\), got"):
        function(Q, K, V[:, :, :9])
