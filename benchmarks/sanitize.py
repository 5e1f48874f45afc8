"""Runs the Hopper kernels on small problems, for the memory and race checkers of the CUDA toolkit.

    XLA_PYTHON_CLIENT_ALLOCATOR=platform compute-sanitizer --tool memcheck python benchmarks/sanitize.py
    XLA_PYTHON_CLIENT_ALLOCATOR=platform compute-sanitizer --tool racecheck python benchmarks/sanitize.py

Or on those that are named: `python benchmarks/sanitize.py ragged packed`. With that allocator every array is
an allocation of its own, so that what reads beyond one is seen. Exits with 1 where a result is not finite.
"""

from __future__ import annotations

import argparse
import sys

import jax
import jax.numpy as jnp
import numpy as np

from flash_attention_jax import flash_attention

# q, k, v and options: every loop of the kernels, ragged and whole, once.
PROBLEMS = {
    "ragged": ((2, 2, 77, 64), (2, 1, 130, 64), (2, 1, 130, 64), {}),
    # More tiles than multiprocessors, clusters, queries in registers.
    "many": ((1, 80, 256, 128), (1, 80, 256, 128), (1, 80, 256, 128), {}),
    "causal": ((1, 2, 256, 128), (1, 1, 256, 128), (1, 1, 256, 128), {"causal": True}),
    "wide": ((1, 1, 128, 256), (1, 1, 192, 256), (1, 1, 192, 256), {"window": (70, 10)}),
    "packed": ((1, 2, 200, 80), (1, 2, 200, 80), (1, 2, 200, 40), {"causal": True, "segments": 2}),
}


def main() -> None:
    """Forward and gradients, with both forms of the backward pass."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help=", ".join(PROBLEMS))
    names = parser.parse_args().names or list(PROBLEMS)
    if unknown := sorted(set(names) - set(PROBLEMS)):
        parser.error(f"names must be among {', '.join(PROBLEMS)}, not {', '.join(unknown)}")
    sound = True
    for name in names:
        *sizes, given = PROBLEMS[name]
        options = dict(given)
        rng = np.random.default_rng(0)
        q, k, v = (jnp.asarray(rng.standard_normal(s), "bfloat16") for s in sizes)
        segments = options.pop("segments", None)
        if segments is not None:
            options["segment_ids"] = (jnp.arange(q.shape[-2]) // (q.shape[-2] // segments))[None]

        def loss(q, k, v, deterministic, options=options):
            result = flash_attention(q, k, v, implementation="hopper", deterministic=deterministic, **options)
            return jnp.sum(result.out.astype(jnp.float32) ** 2)

        def gradients(q, k, v, loss=loss):
            return [jax.grad(loss, (0, 1, 2))(q, k, v, deterministic) for deterministic in (False, True)]

        results = jax.tree.leaves(jax.jit(gradients)(q, k, v))
        finite = all(bool(np.isfinite(np.asarray(x, np.float32)).all()) for x in results)
        print(f"{name}: finite {finite}", flush=True)
        sound &= finite
    sys.exit(not sound)


if __name__ == "__main__":
    main()
