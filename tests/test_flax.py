"""The attention function for Flax, in its layers and by itself."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

flax = pytest.importorskip("flax", reason="Flax is not installed: attention_fn is not tested")

import flax.linen as linen  # noqa: E402
from flax import nnx  # noqa: E402

from flash_attention_jax.flax import attention_fn  # noqa: E402

X = jax.random.normal(jax.random.key(0), (2, 7, 16))
CAUSAL = linen.make_causal_mask(X[..., 0])


def nnx_layer(function, **options):
    options = {"num_heads": 4, "in_features": 16, "decode": False, "attention_fn": function} | options
    return nnx.MultiHeadAttention(**options, rngs=nnx.Rngs(0))


def values_and_gradients(layer, *arguments, **options):
    graph, state = nnx.split(layer)

    def loss(state, arguments):
        out = nnx.merge(graph, state)(*arguments, **options)
        return jnp.sum(out.astype(jnp.float32) ** 2), out

    return jax.value_and_grad(loss, has_aux=True, allow_int=True)(state, arguments)


@pytest.mark.parametrize(
    ("layer", "call"),
    [
        ({}, {}),
        ({}, {"mask": CAUSAL}),
        ({}, {"is_causal": True}),
        ({"normalize_qk": True, "qkv_features": 32, "out_features": 8}, {}),
    ],
)
def test_nnx_layers_compute_what_they_do_with_flaxs(layer, call):
    functions = attention_fn, nnx.dot_product_attention
    actual, expected = (values_and_gradients(nnx_layer(f, **layer), X, **call) for f in functions)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-4, rtol=2e-4), actual, expected)


def test_dropout_that_is_off():
    options = {"dropout_rate": 0.5, "deterministic": True}
    layers = (nnx_layer(f, **options) for f in (attention_fn, nnx.dot_product_attention))
    np.testing.assert_allclose(*(layer(X) for layer in layers), atol=1e-5)


def test_nnx_decoding():
    outs = []
    for function in (attention_fn, nnx.dot_product_attention):
        layer = nnx_layer(function, decode=True)
        layer.init_cache((2, 7, 16))
        outs.append(jnp.concatenate([layer(X[:, i : i + 1]) for i in range(7)], 1))
    np.testing.assert_allclose(*outs, atol=1e-5)
    np.testing.assert_allclose(outs[0], nnx_layer(attention_fn)(X, mask=CAUSAL), atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"dtype": jnp.bfloat16}, {"force_fp32_for_softmax": True}])
def test_linen_layers_compute_what_they_do_with_flaxs(options):
    results = []
    for function in (attention_fn, linen.dot_product_attention):
        layer = linen.MultiHeadDotProductAttention(4, attention_fn=function, **options)
        variables = layer.init(jax.random.key(1), X)

        def loss(variables, layer=layer):
            out = layer.apply(variables, X, mask=CAUSAL).astype(jnp.float32)
            return jnp.sum(out**2), out

        results.append(jax.value_and_grad(loss, has_aux=True)(variables))
    tolerance = 2**-5 if "dtype" in options else 1e-5

    def compare(actual, expected):
        np.testing.assert_allclose(actual, expected, atol=tolerance * np.abs(expected).max(), rtol=0)

    # The gradients of the bias of keys are 0 but for rounding.
    jax.tree.map_with_path(
        lambda path, x, y: None if "'key'" in str(path) and "'bias'" in str(path) else compare(x, y), *results
    )


def test_every_argument_of_flaxs_functions_has_its_place():
    ours = list(inspect.signature(attention_fn).parameters)
    for theirs in (nnx.dot_product_attention, linen.dot_product_attention):
        names = list(inspect.signature(theirs).parameters)
        assert set(names) <= set(ours)
        assert ours[:12] == names[:12]


def test_by_itself():
    keys = jax.random.split(jax.random.key(2), 4)
    shapes = (2, 3, 5, 4, 8), (2, 3, 6, 2, 8), (2, 3, 6, 2, 8), (3, 4, 5, 6)
    q, k, v, bias = (jax.random.normal(*x) for x in zip(keys, shapes, strict=True))
    actual = attention_fn(q, k, v, bias)
    expected = jax.vmap(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, bias))(q, k, v)
    np.testing.assert_allclose(actual, expected, atol=2e-6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"module": 1}, NotImplementedError, r"^module must be None \(sow_weights=False\), .* got int$"),
        ({"dropout_rate": 0.1}, NotImplementedError, r"^dropout_rate must be 0 unless .* got 0\.1$"),
        ({"einsum_dot_general": 1}, NotImplementedError, r"^einsum_dot_general must be None"),
        ({"qk_attn_weights_einsum": 1}, NotImplementedError, r"^qk_attn_weights_einsum must be None"),
        ({"attn_weights_value_einsum": 1}, NotImplementedError, r"^attn_weights_value_einsum must be None"),
        ({"input_positions": 1}, NotImplementedError, r"^input_positions must be None"),
        ({"promote_dtype": nnx.nn.dtypes.promote_dtype}, NotImplementedError, r"^promote_dtype must be None"),
        ({"is_causal": 1}, TypeError, r"^is_causal must be True or False, got 1$"),
        ({"key": X[:, :, None, :3]}, ValueError, r"^key must be of query's head dim D = 16, got"),
    ],
)
def test_unsupported_arguments_are_refused_by_name(arguments, error, message):
    x = X[:, :, None]
    with pytest.raises(error, match=message):
        attention_fn(**{"query": x, "key": x, "value": x} | arguments)


def test_layers_that_sow_weights_or_drop_out_are_refused():
    with pytest.raises(NotImplementedError, match=r"^module must be None"):
        nnx_layer(attention_fn)(X, sow_weights=True)
    with pytest.raises(NotImplementedError, match=r"^dropout_rate must be 0"):
        nnx_layer(attention_fn, dropout_rate=0.1, deterministic=False)(X, rngs=nnx.Rngs(0))
