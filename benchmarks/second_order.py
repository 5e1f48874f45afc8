"""Forward mode and second derivatives of an implementation on the default device, against float64.

    python benchmarks/second_order.py [--implementation hopper] [--dtype bfloat16] [--problem NAME]

Each may err by twice what the plain formula errs by in the same dtype, plus one rounding, as in
`flash_attention_jax.testing`. Exits with 1 where one errs by more.
"""

from __future__ import annotations

import argparse
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np

from flash_attention_jax import flash_attention
from flash_attention_jax._api import attention_and_lse
from flash_attention_jax.testing import error

# q, k, v and options.
PROBLEMS = {
    "full": ((2, 4, 200, 64), (2, 2, 333, 64), (2, 2, 333, 64), {}),
    "causal": ((1, 4, 256, 128), (1, 1, 320, 128), (1, 1, 320, 128), {"causal": True}),
    "window": ((1, 2, 300, 80), (1, 2, 200, 80), (1, 2, 200, 48), {"window": (50, 9)}),
    "softcap": ((1, 2, 130, 256), (1, 2, 130, 256), (1, 2, 130, 256), {"softcap": 2.0, "causal": True}),
}
ALL = (0, 1, 2)
DRAWS = 3


def scalar(out, lse):
    """A function of out and lse that is linear in neither."""
    out, lse = out.astype(jnp.promote_types(out.dtype, "float32")), jnp.where(jnp.isneginf(lse), 0.0, lse)
    return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse))


def orders(function):
    """Named functions of operands and directions."""

    def value(*x):
        return scalar(*function(*x))

    def inner(xs, ys):
        wide = jnp.promote_types(xs[0].dtype, "float32")
        return sum(jnp.vdot(x.astype(wide), y.astype(wide)) for x, y in zip(xs, ys, strict=True))

    def jvp(x, moved):
        (out, lse), tangents = jax.jvp(function, x, moved)
        return out, jnp.where(jnp.isneginf(lse), 0.0, lse), *tangents

    return {
        "jvp": jvp,
        "Hessian-vector product": lambda x, moved: jax.jvp(jax.grad(value, ALL), x, moved)[1],
        "reverse over reverse": lambda x, moved: jax.grad(
            lambda *y: inner(jax.grad(value, ALL)(*y), moved), ALL
        )(*x),
    }


def draws(sizes, dtype):
    """Operands and directions, of values that every dtype has."""
    for draw in range(DRAWS):
        rng = np.random.default_rng(draw)
        arrays = [jnp.asarray(rng.standard_normal(s), dtype) for s in sizes * 2]
        yield tuple(arrays[:3]), tuple(arrays[3:])


def judged(name, implementation, dtype):
    """The worst error over budget of each order of a problem."""
    *sizes, options = PROBLEMS[name]
    ours = functools.partial(flash_attention, implementation=implementation, **options)
    plain = functools.partial(attention_and_lse, **options)
    for order in orders(ours):
        of_ours, of_plain = jax.jit(orders(ours)[order]), jax.jit(orders(plain)[order])
        results = []
        with jax.enable_x64(True):
            for x, moved in draws(sizes, dtype):
                wide = [tuple(y.astype("float64") for y in ys) for ys in (x, moved)]
                found = of_ours(x, moved), of_plain(x, moved), of_plain(*wide)
                results.append([[np.asarray(y, np.float64) for y in ys] for ys in found])
        worst = 0.0
        for quantity in range(len(results[0][0])):
            of_formula = max(error(formula[quantity], exact[quantity]) for _, formula, exact in results)
            for actual, _, exact in results:
                size = float(np.abs(exact[quantity]).max(initial=0.0))
                budget = 2 * of_formula + float(jnp.finfo(dtype).eps) * size
                worst = max(worst, error(actual[quantity], exact[quantity]) / budget)
        yield order, worst


def main() -> None:
    """Prints a line for each order of each problem."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--implementation", default="hopper")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--problem", choices=tuple(PROBLEMS), help="only this one")
    args = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}, {args.implementation}, {args.dtype}")
    passed = True
    for name in PROBLEMS if args.problem is None else (args.problem,):
        for order, worst in judged(name, args.implementation, args.dtype):
            passed &= worst <= 1
            print(f"{name:22} {order:24} error / budget {worst:.2f}", flush=True)
    sys.exit(not passed)


if __name__ == "__main__":
    main()
