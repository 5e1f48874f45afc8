"""The seed's shape, (131072, 512), through `xla` on an accelerator: TFLOP/s forward and with gradients.

python benchmarks/long.py [LENGTH]
"""

from __future__ import annotations

import statistics
import sys
import time

import jax
import jax.numpy as jnp

from flash_attention_jax import flash_attention


def seconds(function, *arrays, calls: int = 3) -> float:
    """Median seconds of a call, after one that is not counted."""
    jax.block_until_ready(function(*arrays))
    taken = []
    for _ in range(calls):
        begun = time.perf_counter()
        jax.block_until_ready(function(*arrays))
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken)


def main() -> None:
    """Prints a line for each precision."""
    length, dim = int(sys.argv[1]) if len(sys.argv) > 1 else 131072, 512
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}, ({length}, {dim}), implementation xla")
    for dtype, precision in (("bfloat16", None), ("float32", "default"), ("float32", None)):
        arrays = [
            jax.random.normal(key, (length, dim), dtype) for key in jax.random.split(jax.random.key(0), 3)
        ]

        def forward(q, k, v, precision=precision):
            return flash_attention(q, k, v, precision=precision, implementation="xla").out

        def loss(q, k, v, forward=forward):
            return jnp.sum(forward(q, k, v).astype(jnp.float32))

        once = seconds(jax.jit(forward), *arrays)
        both = seconds(jax.jit(jax.grad(loss, (0, 1, 2))), *arrays)
        flops = 4 * length**2 * dim / 1e12
        print(
            f"{dtype:8} precision={precision}: forward {flops / once:6.1f}, "
            f"forward and gradients {3.5 * flops / both:6.1f} TFLOP/s",
            flush=True,
        )


if __name__ == "__main__":
    main()
