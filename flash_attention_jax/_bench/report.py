"""A report as a table for the terminal."""

from __future__ import annotations

import itertools
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from flash_attention_jax._bench.machine import size
from flash_attention_jax._bench.results import Cell, Report, Row

# Columns in which a table is measured before the terminal's own are considered.
_WIDEST = 1000


def show(console: Console, report: Report) -> None:
    """Prints a report: a column for each peer, or a line for each where the terminal is narrow."""
    console.print(heading(report))
    wide = _wide(report)
    needed = console.measure(wide, options=console.options.update(width=_WIDEST)).maximum
    if not console.is_terminal:
        console.width = max(console.width, needed)
    console.print(wide if needed <= console.width else _tall(report))
    console.print(legend(report))
    notes = _notes(report)
    if notes is not None:
        console.print(notes)


def heading(report: Report) -> str:
    """The machine in a line."""
    m = report.machine
    versions = m["versions"]
    parts = [m["device"], f"JAX {versions['jax']}"]
    parts += [f"{name} {versions[name]}" for name in ("torch", "tokamax") if name in versions]
    return ", ".join([*parts, f"Python {m['python']}"])


def unit_of(report: Report) -> tuple[float, str]:
    """The unit of all rates of a report: that in which the fastest has at most three digits."""
    rates = [row.rate(c) for row in report.rows for c in row.cells if c.status == "measured"]
    return (1e12, "TFLOP/s") if max(rates, default=0.0) >= 1e12 else (1e9, "GFLOP/s")


def legend(report: Report) -> str:
    """What the numbers are."""
    taken = "one round" if report.repeats == 1 else f"median of {report.repeats} rounds ± half the IQR"
    over, of = f"speed over that of {report.baseline}", ""
    if report.devices > 1:
        part = f"1/{report.devices} of the length"
        over = f"share of {report.devices} times {report.baseline} on one device at {part}"
        of = " of a device"
    return f"{unit_of(report)[1]} of visible pairs, {taken}; {over}; memory{of} beside the inputs."


def _wide(report: Report) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("problem (B, N, T, D)\nmode")
    for peer in report.peers:
        table.add_column(peer.replace(":", "\n"), justify="right", no_wrap=True)
    numbers = _numbered(report)
    for row in report.rows:
        cells = [_text(report, row, row.cell(peer), numbers) for peer in report.peers]
        table.add_row(Group(*_problem(row)), *cells)
        table.add_row()
    return table


def _tall(report: Report) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("problem (B, N, T, D)", overflow="fold")
    table.add_column("peer", no_wrap=True)
    for name in (unit_of(report)[1], "ratio", "memory"):
        table.add_column(name, justify="right", no_wrap=True)
    numbers = _numbered(report)
    for row in report.rows:
        for label, cell in itertools.zip_longest(_problem(row), row.cells):
            shown = _text(report, row, cell, numbers)
            parts = list(shown.split("\n"))
            rate, ratio, memory = (parts + [Text("")] * 2)[:3]
            for more in parts[3:]:
                rate = Text("\n").join([rate, more])
            table.add_row(label or "", cell.peer if cell else "", rate, ratio, memory)
        table.add_row()
    return table


def _problem(row: Row) -> list[str]:
    w = row.workload
    return [w.shape, ", ".join([w.dtype, *w.options]), row.mode]


def _text(report: Report, row: Row, cell: Cell | None, numbers: dict[str, int]) -> Text:
    """A cell in three lines: rate, ratio, memory; or what became of it."""
    if cell is None:
        return Text("")
    if cell.status != "measured":
        style = "bold red" if cell.status == "wrong" else "dim"
        return Text(f"{_verdict(cell)} [{numbers[cell.reason or '']}]", style=style)
    unit, _ = unit_of(report)
    lines = [f"{row.rate(cell) / unit:.3g}"]
    if len(cell.samples) > 1:
        low, high = cell.quartiles
        lines[0] += f" ±{50 * (high - low) / cell.seconds:.0f}%"
    ratio = report.ratio(row, cell)
    lines.append("" if ratio is None else f"{ratio:.2f}x")
    lines.append("" if cell.memory is None else size(cell.memory))
    if cell.worst > 1:
        lines.append(f"error {cell.worst:.1f} budgets")
    if cell.host_bound:
        lines.append("host-bound")
    return Text("\n".join(lines))


def _verdict(cell: Cell) -> str:
    if cell.status == "wrong":
        return "WRONG"
    return "out of memory" if (cell.reason or "").startswith("out of memory") else "cannot run"


def _numbered(report: Report) -> dict[str, int]:
    """The reasons why something was not measured, numbered from 1."""
    reasons = (c.reason or "" for row in report.rows for c in row.cells if c.status != "measured")
    return {reason: number for number, reason in enumerate(dict.fromkeys(reasons), 1)}


def _notes(report: Report) -> Any:
    """The reasons by number, and what the automatic choice was."""
    grid = Table.grid(padding=(0, 1))
    chosen: dict[str, list[str]] = {}
    for row in report.rows:
        for cell in row.cells:
            if cell.note is not None and cell.note not in chosen.setdefault(cell.peer, []):
                chosen[cell.peer].append(cell.note)
    for peer, notes in chosen.items():
        grid.add_row("", f"{peer} chose {', '.join(notes)}.")
    for reason, number in _numbered(report).items():
        grid.add_row(f"[{number}]", reason)
    return grid if grid.row_count else None
