"""The figures of the core on this machine: memory, skipping, speed beside plain attention, the seed.

python benchmarks/core.py memory skip plain      # a few minutes
python benchmarks/core.py seed                   # 131072 queries and keys of 512 in one call
"""

from __future__ import annotations

import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flash_attention_jax import attention, flash_attention, value_and_grad_difference
from flash_attention_jax.testing import error

MIB = 2**20


def out_of(**options: Any) -> Callable[..., jax.Array]:
    """flash_attention's `out` with these options."""
    return lambda q, k, v: flash_attention(q, k, v, **options).out


def gradient(f: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Gradients of a scalar of f's output in q, k and v."""
    return jax.grad(lambda *x: jnp.sum(f(*x) ** 2), (0, 1, 2))


def inner(xs: Any, ys: Any) -> jax.Array:
    """The inner product of two tuples of arrays."""
    return sum(jnp.vdot(x, y) for x, y in zip(xs, ys, strict=True))


def seconds(functions: dict[str, Callable[..., Any]], arguments: Any, repeats: int) -> dict[str, float]:
    """Median seconds of each on the arguments, interleaved."""
    for f in functions.values():
        jax.block_until_ready(f(*arguments))
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, f in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(f(*arguments))
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(x) for name, x in times.items()}


def memory() -> None:
    """Temporary memory of the compiled programs."""

    def programs(f):
        g = gradient(f)
        return {
            "forward": (f, 1),
            "grad": (g, 1),
            "jvp": (lambda *x: jax.jvp(f, x[:3], x[3:]), 2),
            "hvp": (lambda *x: jax.jvp(g, x[:3], x[3:])[1], 2),
            "rev-rev": (lambda *x: jax.grad(lambda *y: inner(g(*y), x[3:]), (0, 1, 2))(*x[:3]), 2),
        }

    def mib(f, copies, *shape):
        x = jax.ShapeDtypeStruct(shape, jnp.float32)
        compiled = jax.jit(f).lower(*(x,) * (3 * copies)).compile()
        return compiled.memory_analysis().temp_size_in_bytes / MIB

    for name, (f, copies) in programs(out_of()).items():
        print(f"temporary memory at (131072, 512), {name}: {mib(f, copies, 131072, 512):.0f} MiB")
    for name, (f, copies) in programs(out_of()).items():
        used = [mib(f, copies, 4, T, 64) for T in (8192, 16384, 32768)]
        print(f"4 heads of 64, T = 8192, 16384, 32768, {name}: " + ", ".join(f"{x:.0f} MiB" for x in used))


def skip() -> None:
    """Time of causal and windowed attention over that of full attention."""
    for label, T, options in (("causal", 8192, {"causal": True}), ("window=256", 16384, {"window": 256})):
        q, k, v = (jax.random.normal(x, (4, T, 64)) for x in jax.random.split(jax.random.key(0), 3))
        for kind, wrap in (("forward", lambda f: f), ("gradient", gradient)):
            full, some = jax.jit(wrap(out_of())), jax.jit(wrap(out_of(**options)))
            taken = seconds({"full": full, "some": some}, (q, k, v), 3)
            ratio = taken["some"] / taken["full"]
            print(f"{label}, T = {T}, 4 heads of 64, {kind}: {ratio:.3f} of full ({taken['full']:.2f} s)")


def plain() -> None:
    """Speed over plain attention, and the difference of the two."""
    diff, gradients = value_and_grad_difference(attention, flash_attention, seed=42)
    print(f"value_and_grad_difference: {diff:.1e}, " + ", ".join(f"{x:.1e}" for x in gradients))
    for T in (1024, 2048, 4096):
        for heads, dim in ((1, 64), (8, 64), (1, 128), (4, 128), (1, 512)):
            q, k, v = (jax.random.normal(x, (heads, T, dim)) for x in jax.random.split(jax.random.key(0), 3))
            row = []
            for wrap in (lambda f: f, gradient):
                ours, theirs = jax.jit(wrap(out_of())), jax.jit(wrap(attention))
                repeats = max(3, 15 * 1024 // T)
                taken = seconds({"ours": ours, "plain": theirs}, (q, k, v), repeats)
                row.append(taken["plain"] / taken["ours"])
            print(f"T = {T}, {heads} heads of {dim}: forward {row[0]:.2f}, gradient {row[1]:.2f} times plain")


def seed() -> None:
    """The seed's example in one call: time, peak memory, the error of 32 rows."""
    key = jax.random.key(42)
    q, k, v = (jax.random.normal(x, (131072, 512)) for x in jax.random.split(key, 3))
    start = time.perf_counter()
    out, _ = flash_attention(q, k, v)
    out.block_until_ready()
    taken = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"(131072, 512): {taken:.0f} s with compilation, {4 * 131072**2 * 512 / taken / 1e9:.0f} GFLOP/s")
    print(f"peak resident memory {peak:.0f} MiB; the T x S matrix would take {131072**2 * 4 / MIB:.0f} MiB")
    rows = np.random.default_rng(0).choice(131072, 32, replace=False)
    keys, values = np.asarray(k, np.float64), np.asarray(v, np.float64)
    logits = np.asarray(q, np.float64)[rows] @ keys.T * 512**-0.5
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    truth = weights @ values / weights.sum(-1, keepdims=True)
    formula = np.asarray(attention(q[rows], k, v), np.float64)
    budget = 2 * error(formula, truth) + float(jnp.finfo(jnp.float32).eps) * np.abs(truth).max()
    print(f"32 rows: error {error(np.asarray(out, np.float64)[rows], truth):.2e}, budget {budget:.2e}")


if __name__ == "__main__":
    print(f"Python {platform.python_version()}, JAX {jax.__version__}, {jax.devices()[0].device_kind}")
    parts = {"memory": memory, "skip": skip, "plain": plain, "seed": seed}
    chosen = sys.argv[1:] or ["memory", "skip", "plain"]
    unknown = [name for name in chosen if name not in parts]
    if unknown:
        sys.exit(f"unknown part {unknown[0]!r}: one of {', '.join(parts)}")
    for name in chosen:
        parts[name]()
