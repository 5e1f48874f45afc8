"""`demo`: attention over arrays of the README's shape, timed, and compared with exact rows."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import sys
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from flash_attention_jax._api import attention, flash_attention
from flash_attention_jax._arguments import FLOATS
from flash_attention_jax._cli.parse import positive
from flash_attention_jax._cli.terminal import answer, machine_line, progress
from flash_attention_jax._explain import explain

# Rows of the result that are judged.
_ROWS = 8
# Rows that the plain formula's error is measured on, those above among them. 2 CPU cores, JAX 0.10.2,
# dim 512, lengths 4096 to 20480, 2000 random choices each: measured on the 8 rows alone it put 1.4 to
# 2.0 % of the choices over the budget, on 64 rows at most 0.1 %.
_PLAIN_ROWS = 64
# 2 Zen 4 cores, JAX 0.10.2, dim 512, float32: 165 GFLOP/s, so that 1.2 TFLOP take 7.5 s.
_LENGTH = 24576
# Enough for the bar to move, few enough that a call still fills the device.
_SLICES = {"cpu": 24}
_SLICES_ELSEWHERE = 8


@dataclasses.dataclass(frozen=True)
class Slices:
    """Equal slices of the queries, so that one compiled function serves them all.

    Where the size does not divide the length the last slice starts earlier and overlaps the one
    before it: those rows are computed twice, timed twice and counted once.
    """

    length: int
    size: int

    @classmethod
    def of(cls, length: int, count: int) -> Slices:
        """At most `count` slices."""
        return cls(length, -(-length // count))

    @property
    def starts(self) -> tuple[int, ...]:
        """The first row of each slice."""
        return tuple(min(x, self.length - self.size) for x in range(0, self.length, self.size))

    def fresh(self, index: int) -> range:
        """The rows of a slice that no earlier slice has."""
        return range(index * self.size, min((index + 1) * self.size, self.length))

    def place(self, row: int) -> tuple[int, int]:
        """The slice that holds a row, and the row within it."""
        index = row // self.size
        return index, row - self.starts[index]


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """How far some rows are from exact ones, and how far they may be (see `testing`).

    Attributes:
        rows: how many were judged.
        plain_rows: how many the plain formula's error was measured on.
    """

    error: float
    budget: float
    rows: int
    plain_rows: int

    @property
    def within(self) -> bool:
        """Whether the error is within its budget; a NaN is not."""
        return self.error <= self.budget


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declares the command."""
    parser = subparsers.add_parser(
        "demo",
        help="attention over long arrays: time, memory and error on this machine",
        description="Runs `out, _ = flash_attention(q, k, v)` for random q, k, v of shape (length, dim), "
        "and compares random rows of the result with float64. Exits with 1 where they differ by "
        "more than the error budget.",
    )
    parser.add_argument(
        "--length",
        type=positive,
        default=_LENGTH,
        metavar="N",
        help=f"queries and keys (default {_LENGTH}; the README's example has 131072)",
    )
    parser.add_argument("--dim", type=positive, default=512, metavar="D", help="head dim (default 512)")
    parser.add_argument("--dtype", choices=FLOATS, default="float32", help="default float32")
    parser.add_argument("--causal", action="store_true", help="a query sees the keys up to its own position")
    parser.add_argument(
        "--slices",
        type=positive,
        metavar="N",
        help="cut the queries into at most N calls, for the progress bar "
        f"(default {_SLICES['cpu']} on the CPU, {_SLICES_ELSEWHERE} elsewhere)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command; the exit status is 1 where the result is not accurate."""
    console = answer()
    count = args.slices or _SLICES.get(jax.default_backend(), _SLICES_ELSEWHERE)
    slices = Slices.of(args.length, count)
    console.print(f"flash_attention on {machine_line()}")
    with jax.enable_x64(args.dtype == "float64"):
        keys = jax.random.split(jax.random.key(42), 3)
        q, k, v = (jax.random.normal(x, (args.length, args.dim), args.dtype) for x in keys)
        part = functools.partial(_slice, q, k, v, size=slices.size, causal=args.causal)
        console.print(f"q, k, v: ({args.length}, {args.dim}) {args.dtype}{', causal' if args.causal else ''}")
        console.print(
            f"calls: {len(slices.starts)} of {slices.size} queries each, by {_chosen(q, k, v, args)}"
        )
        console.print("compiling, and running one call, not counted below:", end=" ")
        started = time.perf_counter()
        part(0).block_until_ready()
        console.print(f"{time.perf_counter() - started:.1f} s")
        outs, seconds = _timed(part, slices, args.causal)
        peak = _peak_memory()
        rows = np.random.default_rng(0).choice(args.length, min(_PLAIN_ROWS, args.length), replace=False)
        judged = _gather(outs, slices, rows[:_ROWS])
        accuracy = _accuracy(q, k, v, judged, rows, args.causal)
    console.print(_report(args, seconds, peak, accuracy))
    return 0 if accuracy.within else 1


@functools.partial(jax.jit, static_argnames=("size", "causal"))
def _slice(q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array, size: int, causal: bool) -> jax.Array:
    """Attention of the queries from `start` on, which is traced: one compilation serves all slices."""
    rows = jax.lax.dynamic_slice_in_dim(q, start, size)
    out, _ = flash_attention(rows, k, v, causal=causal, q_offset=start if causal else None)
    return out


def _chosen(q: jax.Array, k: jax.Array, v: jax.Array, args: argparse.Namespace) -> str:
    offset = jax.ShapeDtypeStruct((), "int32") if args.causal else None
    return explain(q, k, v, causal=args.causal, q_offset=offset).chosen


def _timed(part: Callable[[int], jax.Array], slices: Slices, causal: bool) -> tuple[list[jax.Array], float]:
    """The results of all slices, under a progress bar that advances by visible pairs."""
    outs = []
    with progress() as bar:
        task = bar.add_task(
            "attention", total=visible_pairs(range(slices.length), slices.length, causal), note=""
        )
        started = time.perf_counter()
        for index, start in enumerate(slices.starts):
            outs.append(part(start).block_until_ready())
            bar.advance(task, visible_pairs(slices.fresh(index), slices.length, causal))
        seconds = time.perf_counter() - started
    return outs, seconds


def visible_pairs(rows: range, length: int, causal: bool) -> int:
    """How many (query, key) pairs a range of queries sees, of as many keys as there are queries."""
    if not causal:
        return len(rows) * length
    return (rows.start + 1 + rows.stop) * len(rows) // 2


def _gather(outs: Sequence[jax.Array], slices: Slices, rows: np.ndarray) -> np.ndarray:
    places = (slices.place(int(row)) for row in rows)
    return np.stack([np.asarray(outs[index][row], np.float64) for index, row in places])


def _accuracy(
    q: jax.Array, k: jax.Array, v: jax.Array, actual: np.ndarray, rows: np.ndarray, causal: bool
) -> Accuracy:
    """Compares `actual`, the results of the first of `rows`, with float64.

    The plain formula's error is its largest in all of `rows`, since that in a few rows says little
    about its rounding.
    """
    wide_q, wide_k, wide_v = (np.asarray(x, np.float64) for x in (q[rows], k, v))
    exact = exact_rows(wide_q, wide_k, wide_v, rows, causal)
    mask = jnp.arange(k.shape[0]) <= rows[:, None] if causal else None
    plain = np.asarray(attention(q[rows], k, v, mask=mask), np.float64)
    judged = exact[: len(actual)]
    error, plain_error = (float(np.abs(x - y).max()) for x, y in ((actual, judged), (plain, exact)))
    budget = 2 * plain_error + float(jnp.finfo(q.dtype).eps) * float(np.abs(judged).max())
    return Accuracy(error, budget, len(actual), len(rows))


def exact_rows(q: np.ndarray, k: np.ndarray, v: np.ndarray, rows: np.ndarray, causal: bool) -> np.ndarray:
    """Attention in float64 NumPy, row by row, written without anything of this library.

    Args:
        q: the rows' queries (len(rows), D), float64.
        k, v: all keys and values, float64.
    """
    result = []
    for query, row in zip(q, rows, strict=True):
        seen = slice(0, row + 1) if causal else slice(None)
        logits = k[seen] @ query / math.sqrt(query.size)
        weights = np.exp(logits - logits.max())
        result.append(weights @ v[seen] / weights.sum())
    return np.stack(result)


def _peak_memory() -> tuple[int, str] | None:
    """The most bytes held so far, and by what; None where nobody counts them."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        peak = stats.get("peak_bytes_in_use")
        return None if peak is None else (peak, "of the device")
    if sys.platform == "win32":
        return None
    import resource

    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "of the whole process, JAX included"


def _report(
    args: argparse.Namespace, seconds: float, peak: tuple[int, str] | None, accuracy: Accuracy
) -> Table:
    """What was measured, as lines of a name and a value."""
    pairs = visible_pairs(range(args.length), args.length, args.causal)
    table = Table.grid(padding=(0, 2))
    table.add_row("time", f"{seconds:.3g} s")
    table.add_row("speed", f"{4 * pairs * args.dim / seconds / 1e9:,.3g} GFLOP/s")
    table.add_row("peak memory", "not reported" if peak is None else f"{_size(peak[0])} {peak[1]}")
    table.add_row("", f"{_size(4 * args.length**2)} is what a T x S float32 matrix alone would take")
    table.add_row(f"error of {accuracy.rows} rows", f"{accuracy.error:.2e} against float64")
    budget = f"{accuracy.budget:.2e}, 2 * plain attention's ({accuracy.plain_rows} rows) + eps * max|exact|"
    table.add_row("error budget", budget)
    verdict = "the error is within the budget" if accuracy.within else "THE ERROR IS OVER THE BUDGET"
    table.add_row("verdict", verdict, style="green" if accuracy.within else "bold red")
    return table


def _size(count: int) -> str:
    unit = min(3, max(0, count.bit_length() - 1) // 10)
    return f"{count / 1024**unit:.4g} {('B', 'KiB', 'MiB', 'GiB')[unit]}"
