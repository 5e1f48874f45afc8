"""The forward kernels of several checkouts side by side in one process: same bits? how fast?

    python benchmarks/compare.py export FOLDER        # in each checkout; needs no GPU
    python benchmarks/compare.py run FOLDER FOLDER... # on a GPU

The first folder is what the others are compared with, by the bits of out and lse, of hidden NaN too.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any

import hopper
import jax
import jax.numpy as jnp
from exported import group, load, save, seconds
from hopper_cases import CHECKS, SHAPES

ROUNDS = 2


def export(folder: pathlib.Path) -> None:
    """Lowers the kernels of this checkout."""
    for kind, table in (("time", SHAPES), ("check", CHECKS)):
        for shape in table:
            job = {"kind": kind, "shape": shape, "dtype": "bfloat16"}
            given = hopper.given_of(job, abstract=True)
            save(folder, job, jax.jit(hopper.function(job, given)), *hopper.shapes_of(job, given))


@jax.jit
def differing(a: Any, b: Any) -> Any:
    """How many numbers differ in their bits; a NaN is like every other."""
    kinds = {2: jnp.uint16, 4: jnp.uint32}

    def bits(x):
        return jax.lax.bitcast_convert_type(x, kinds[x.dtype.itemsize])

    return sum(
        ((bits(x) != bits(y)) & ~(jnp.isnan(x) & jnp.isnan(y))).sum() for x, y in zip(a, b, strict=True)
    )


def with_hidden_nan(given: hopper.Inputs) -> tuple[Any, Any] | None:
    """Arrays with NaN for values that are hidden, and the queries they are hidden from; or None."""
    p, operands = given.problem, given.operands
    if operands.key_mask is not None:
        hidden, rows = ~operands.key_mask, slice(None)
    elif p.right is not None and p.T == p.S:
        hidden, rows = jnp.arange(p.S)[None] == p.S - 1, slice(0, p.T - 1)
    else:
        return None
    v = jnp.where(hidden[:, :, None, None], jnp.nan, operands.v).astype(operands.v.dtype)
    return operands._replace(v=v).present(), rows


def checked(given: hopper.Inputs, programs: dict[str, Any]) -> dict[str, Any]:
    """Numbers that differ from those of the first program, by program."""
    arrays, poisoned = given.operands.present(), with_hidden_nan(given)
    first = next(iter(programs.values()))(*arrays)
    found = {}
    for name, program in programs.items():
        result = program(*arrays)
        found[name] = {
            "differ": int(differing(first, result)),
            "again": int(differing(result, program(*arrays))),
        }
        if poisoned is not None:
            out = program(*poisoned[0])[0][:, poisoned[1]]
            found[name]["hidden_nan"] = int(differing([result[0][:, poisoned[1]]], [out]))
            found[name]["hidden_nan_ms"] = 1e3 * group(program, poisoned[0], 3)
    return found


def cudnn(job: dict[str, Any], given: hopper.Inputs) -> Any:
    """cuDNN's program, or None where it has none."""
    if given.problem.key_mask or given.problem.segments:
        return None
    peer = hopper.function({**job, "kind": "cudnn"}, given)
    return jax.jit(peer).lower(*given.operands.present()).compile()


def run(folders: list[pathlib.Path], out: pathlib.Path) -> None:
    """Compiles everything, then checks it, and times it in rounds, the folders taking turns."""
    programs: dict[tuple[str, str], dict[str, Any]] = {}
    for folder in folders:
        for job, program in load(folder):
            programs.setdefault((job["kind"], job["shape"]), {})[folder.name] = program
    results: dict[str, Any] = {}
    for turn in range(ROUNDS):
        for (kind, shape), found in programs.items():
            if turn and kind == "check":
                continue
            job = {"kind": kind, "shape": shape}
            given, row = hopper.given_of(job), results.setdefault(f"{kind} {shape}", {})
            if turn == 0:
                row["bits"] = checked(given, found)
                peer = cudnn(job, given) if kind == "time" else None
                found |= {} if peer is None else {"cudnn": peer}
            if kind == "time":
                p = given.problem
                flops = 2 * p.N * (p.D + p.Dv) * hopper.visible_pairs(given)
                for name in list(found)[:: -1 if turn else 1]:
                    taken = seconds(found[name], given.operands.present())
                    row.setdefault("tflops", {}).setdefault(name, []).append(round(flops / taken / 1e12, 1))
            print(turn, kind, shape, row, flush=True)
        document = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "results": results}
        out.write_text(json.dumps(document, indent=1) + "\n")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("export", "run"))
    parser.add_argument("folders", nargs="+", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("compare.json"))
    args = parser.parse_args()
    if args.what == "run":
        run(args.folders, args.out)
        return
    jax.config.update("jax_platforms", "cpu")
    for folder in args.folders:
        export(folder)


if __name__ == "__main__":
    main()
