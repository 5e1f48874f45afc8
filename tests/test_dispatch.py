"""The choice of an implementation, at lowering."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from flash_attention_jax import Unsupported, attention, explain, flash_attention
from flash_attention_jax._dispatch import IMPLEMENTATIONS

X = jax.ShapeDtypeStruct((2, 64, 16), jnp.float32)


def gradient(q, k, v):
    return jax.grad(lambda q: jnp.sum(flash_attention(q, k, v, causal=True).out ** 2))(q)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "rocm", "tpu"])
def test_exports_for_a_platform_that_is_not_here(platform):
    exported = export.export(jax.jit(gradient), platforms=[platform])(X, X, X)
    assert exported.platforms == (platform,)


def test_exports_for_several_platforms_and_runs():
    exported = export.export(jax.jit(gradient), platforms=["cpu", "cuda", "tpu"])(X, X, X)
    q = np.random.default_rng(0).standard_normal(X.shape).astype(np.float32)
    np.testing.assert_allclose(exported.call(q, q, q), gradient(q, q, q), rtol=1e-6)


def test_every_call_is_lowered_by_the_platform_lowered_for(replaced_implementation):
    seen = []
    real = IMPLEMENTATIONS["xla"]

    def forward(problem, operands, device):
        seen.append(device.platform)
        return real.forward(problem, operands, device)

    replaced_implementation("xla", forward=forward)
    f = jax.jit(lambda q: flash_attention(q, q, q).out)
    f.trace(X).lower(lowering_platforms=("cuda",))
    assert seen == ["cuda"]
    f.trace(X).lower(lowering_platforms=("cpu",))
    assert seen == ["cuda", "cpu"]


def test_what_xla_refuses_goes_to_the_next_and_never_silently_when_asked_for(replaced_implementation):
    def refuses(problem, device):
        return "windows are not taken" if problem.left is not None else None

    replaced_implementation("xla", refuses=refuses)
    q = jnp.ones((32, 8))
    out = flash_attention(q, q, q, window=3).out
    np.testing.assert_allclose(out, attention(q, q, q, window=3), rtol=1e-6)
    said = explain(q, q, q, window=3)
    assert said.chosen == "reference"
    elsewhere = "it runs on CUDA devices of compute capability 9.0, not on cpu"
    assert said.refusals == {"xla": "windows are not taken", "reference": None, "hopper": elsewhere}
    assert "windows are not taken" in str(said)
    with pytest.raises(Unsupported, match="'xla' cannot run this problem: windows are not taken"):
        flash_attention(q, q, q, window=3, implementation="xla")
    with pytest.raises(Unsupported, match="windows are not taken"):
        jax.grad(lambda q: flash_attention(q, q, q, window=3, implementation="xla").out.sum())(q)


def test_derivatives_run_the_implementation_that_was_asked_for(replaced_implementation):
    calls = []
    for name, implementation in tuple(IMPLEMENTATIONS.items()):

        def spy(kind, real, name=name):
            def run(*arguments):
                calls.append((name, kind))
                return real(*arguments)

            return run

        kinds = {
            kind: spy(kind, getattr(implementation, kind)) for kind in ("forward", "backward", "tangent")
        }
        replaced_implementation(name, **kinds)
    for name in ("xla", "reference"):
        calls.clear()

        def f(q, name=name):
            return jnp.sum(flash_attention(q, jnp.ones_like(q), q, implementation=name).out)

        jax.grad(f)(jnp.ones((8, 4)))
        assert set(calls) == {(name, "forward"), (name, "backward")}
        calls.clear()
        jax.jvp(f, (jnp.ones((8, 4)),), (jnp.ones((8, 4)),))
        assert set(calls) == {(name, "forward"), (name, "tangent")}


def test_explain_takes_structs_and_names_the_choice():
    x = jax.ShapeDtypeStruct((8, 4096, 64), "bfloat16")
    said = explain(x, x, x, causal=True, platform="cuda")
    assert said.chosen == "xla"
    assert said.device.platform == "cuda"
    assert list(said.refusals) == list(IMPLEMENTATIONS)
    assert str(said).splitlines()[0].startswith("B=1 N=8 K=8 T=4096 S=4096 D=64 Dv=64 bfloat16 on cuda")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_lowers_for_an_accelerator_with_every_option(dtype):
    q = jax.ShapeDtypeStruct((2, 4, 96, 16), dtype)
    k = jax.ShapeDtypeStruct((2, 2, 80, 16), dtype)

    def f(q, k, v, bias, key_mask, offset):
        out, lse = flash_attention(
            q, k, v, key_mask, bias=bias, q_offset=offset, causal=True, window=20, softcap=3.0
        )
        return jnp.sum(out.astype(jnp.float32)) + jnp.sum(lse)

    arrays = (
        jax.ShapeDtypeStruct((4, 96, 80), jnp.float32),
        jax.ShapeDtypeStruct((2, 80), jnp.bool_),
        jax.ShapeDtypeStruct((2,), jnp.int32),
    )
    for platform in ("cuda", "tpu"):
        for function in (f, jax.grad(f, (0, 1, 2, 3))):
            jax.jit(function).trace(q, k, k, *arrays).lower(lowering_platforms=(platform,))
