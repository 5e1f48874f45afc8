"""What `hopper.py` runs of the Hopper backward kernel: gradients against the oracle, and times.

A check job compares dq, dk and dv, random cotangents of out and of lse, with float64. A time job runs forward
and backward together, or with `alone` the backward kernel on what a forward pass left. The `form` of the
backward pass is "fused", "deterministic", or one kernel of the latter: "dq", "dkv".
"""

from __future__ import annotations

import dataclasses
from typing import Any

NAMES = ("q", "k", "v")


def arrays(given: Any) -> tuple[Any, ...]:
    """The present operands, then random cotangents of out and of lse."""
    import jax

    p = given.problem
    keys = jax.random.split(jax.random.key(1), 2)
    rows = (p.N, p.T) if p.order == "BNTD" else (p.T, p.N)
    dout = jax.random.normal(keys[0], (p.B, *rows, p.Dv), p.dtype)
    return (*given.operands.present(), dout, jax.random.normal(keys[1], (p.B, p.N, p.T), "float32"))


def function(job: dict[str, Any], given: Any) -> Any:
    """What a job runs on `arrays`: their gradients."""
    return _peer(given) if job["kind"] == "cudnn" else _ours(job, given.problem)


def _peer(given: Any) -> Any:
    import jax

    if given.problem.key_mask or given.problem.segments:
        raise ValueError("its mask would be dense here")

    def gradients(q, k, v, dout, dlse):
        def forward(*operands):
            return jax.nn.dot_product_attention(
                *operands,
                is_causal=given.causal,
                local_window_size=given.window,
                implementation="cudnn",
            )

        return jax.vjp(forward, q, k, v)[1](dout)

    return gradients


def _ours(job: dict[str, Any], p: Any) -> Any:
    import jax
    import jax.numpy as jnp

    from flash_attention_jax._formulas import delta_of
    from flash_attention_jax._impl.base import Device
    from flash_attention_jax._impl.hopper import _backward_configs, _forward
    from flash_attention_jax._problem import Operands

    reason = _backward_configs.refuses_backward(p)
    if reason is not None:
        raise ValueError(reason)
    device = Device("cuda", jax.devices()[0].device_kind)

    def gradients(*given_arrays):
        *operands, dout, dlse = given_arrays
        operands = Operands.given(p, operands)
        if job.get("alone"):
            # The right order of magnitude. Small weights take less power, so that this is faster than after a
            # forward pass.
            lse = jnp.full((p.B, p.N, p.T), 10.0, jnp.float32) + 0 * dlse
            return _backward_of(job, p, operands, lse, dout, dlse)
        out, lse = _forward.forward(p, operands, device)
        if job["kind"] == "time":
            dlse = jnp.zeros_like(dlse)
        delta = delta_of(p, out, dout, jnp.where(lse == -jnp.inf, 0, dlse))
        if job["kind"] == "check":
            operands, dout, delta = _with_dead_rows_of_nan(p, operands, lse, dout, delta)
        return _backward_of(job, p, operands, lse, dout, delta)

    return gradients


def _backward_of(job: dict[str, Any], problem: Any, *arrays: Any) -> list[Any]:
    """The backward pass in the form of a job, whose change is for the one kernel that it names."""
    from flash_attention_jax._impl.hopper import _backward, _backward_configs, _dq, _dq_configs

    form, change = job.get("form", "fused"), job.get("change", {})
    fused = dataclasses.replace(
        _backward_configs.choose_backward_config(problem), **({} if form == "dq" else change)
    )
    if form == "fused":
        return _backward.backward(problem, *arrays, NAMES, config=fused)
    results = []
    if form in ("dq", "deterministic"):
        config = dataclasses.replace(
            _dq_configs.choose_dq_config(problem), **(change if form == "dq" else {})
        )
        results.append(_dq.query_gradient(problem, *arrays, config=config))
    if form in ("dkv", "deterministic"):
        results += _backward.backward(problem, *arrays, NAMES[1:], config=fused)
    return results


def _with_dead_rows_of_nan(problem: Any, operands: Any, lse: Any, dout: Any, delta: Any) -> tuple[Any, ...]:
    """Queries that see nothing may hold anything, and so may their cotangents."""
    import jax.numpy as jnp

    dead = lse == -jnp.inf
    rows = (dead if problem.order == "BNTD" else dead.swapaxes(1, 2))[..., None]
    q, dout = (jnp.where(rows, jnp.nan, x).astype(x.dtype) for x in (operands.q, dout))
    return operands._replace(q=q), dout, jnp.where(dead, jnp.nan, delta)


def flops(given: Any, pairs: int, job: dict[str, Any]) -> float:
    """3.5 times those of the forward pass, and for a backward pass alone half its products times them."""
    p = given.problem
    products = {"fused": 5, "deterministic": 5, "dq": 3, "dkv": 4}[job.get("form", "fused")]
    return 2 * p.N * (p.D + p.Dv) * pairs * (products / 2 + (not job.get("alone")))


def checked(given: Any, compiled: Any) -> dict[str, Any]:
    """Errors of dq, dk and dv and their budgets: as `flash_attention_jax.testing` has them, of one draw."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from flash_attention_jax._impl.reference import dense
    from flash_attention_jax._problem import Operands
    from flash_attention_jax.testing import error

    p = given.problem
    everything = arrays(given)
    actual = compiled(*everything)
    host = [np.asarray(x) for x in everything]

    def gradients(dtype):
        problem = dataclasses.replace(p, dtype=dtype)
        *operands, dout, dlse = (jnp.asarray(x) for x in host)
        operands = Operands.given(p, operands)

        def of(q, k, v):
            out, lse = dense(problem, operands._replace(q=q, k=k, v=v))
            return out, jnp.where(lse == -jnp.inf, 0, lse)

        (out, lse), pull = jax.vjp(of, *(getattr(operands, n).astype(dtype) for n in NAMES))
        return pull((dout.astype(out.dtype), dlse.astype(lse.dtype)))

    with jax.default_device(jax.devices("cpu")[0]):
        plain = gradients(p.dtype)
        with jax.enable_x64(True):
            exact = gradients("float64")
    result: dict[str, Any] = {"within": True}
    for name, x, y, z in zip(NAMES, actual, plain, exact, strict=True):
        x, y, z = (np.asarray(a, np.float64) for a in (x, y, z))
        largest = np.abs(z[np.isfinite(z)]).max(initial=0.0)
        found, budget = error(x, z), 2 * error(y, z) + float(jnp.finfo(p.dtype).eps) * float(largest)
        result[f"d{name}"] = [found if np.isfinite(found) else None, budget]
        result["within"] &= bool(found <= budget)
    return result
