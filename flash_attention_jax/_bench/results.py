"""What was measured, and its JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from typing import Any, Literal

from flash_attention_jax._bench.workload import Workload
from flash_attention_jax.testing import Verdict

FORMAT = 1
Status = Literal["measured", "cannot run", "wrong"]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One peer on one workload in one mode.

    Attributes:
        reason: why it was not measured.
        verdicts: how its results compare with their error budgets.
        samples: seconds of a call, by round, each the mean of `calls` calls.
        memory: bytes that a call takes beside its inputs (temporary and outputs); None if unknown.
        compile_seconds: tracing and compiling.
        host_seconds: in which the host starts a call, where that happens beside the device's work.
        loop_seconds: of a call within a program that makes many, where that was measured.
        note: what was chosen, where the peer chooses.
    """

    peer: str
    status: Status
    reason: str | None = None
    verdicts: tuple[Verdict, ...] = ()
    calls: int | None = None
    samples: tuple[float, ...] = ()
    memory: int | None = None
    compile_seconds: float | None = None
    host_seconds: float | None = None
    loop_seconds: float | None = None
    note: str | None = None

    @property
    def seconds(self) -> float:
        """The median sample."""
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The samples' lower and upper quartile, seconds."""
        if len(self.samples) == 1:
            return self.samples[0], self.samples[0]
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return low, high

    @property
    def worst(self) -> float:
        """The largest error as a share of its budget; infinite where values are not finite."""
        return max((_share(v) for v in self.verdicts), default=0.0)

    @property
    def host_bound(self) -> bool:
        """Whether starting calls may have taken longer than the device's work."""
        alone = self.loop_seconds is not None and self.seconds > 1.2 * self.loop_seconds
        return alone or (self.host_seconds is not None and self.host_seconds > 0.8 * self.seconds)


@dataclasses.dataclass(frozen=True)
class Row:
    """All peers on one workload in one mode.

    Attributes:
        pairs: visible (query, key) pairs of all heads and batch elements.
        flops: useful floating-point operations of a call.
        judged_rows: how many of the queries were compared with float64.
    """

    workload: Workload
    mode: str
    pairs: int
    flops: float
    judged_rows: int
    cells: tuple[Cell, ...]

    def cell(self, peer: str) -> Cell | None:
        """The cell of a peer that was asked for."""
        return next((c for c in self.cells if c.peer == peer), None)

    def rate(self, cell: Cell) -> float:
        """Useful FLOP/s."""
        return self.flops / cell.seconds

    def ratio(self, cell: Cell, baseline: str) -> float | None:
        """The baseline's time over the cell's: the median over rounds, which hold both."""
        other = self.cell(baseline)
        if other is None or other.status != "measured" or cell.status != "measured":
            return None
        return statistics.median(b / a for a, b in zip(cell.samples, other.samples, strict=True))


@dataclasses.dataclass(frozen=True)
class Report:
    """A run of the benchmark.

    Attributes:
        machine: device, versions and threads (see `machine.describe`).
        command: the command line's arguments.
        started: date and time in UTC, ISO 8601.
        baseline: the peer that ratios are over.
        devices: over how many devices the peers other than the baseline run, which then runs on one, at
            that part of the length and in rows of its own.
    """

    machine: dict[str, Any]
    command: tuple[str, ...]
    started: str
    repeats: int
    baseline: str
    rows: tuple[Row, ...]
    devices: int = 1

    def ratio(self, row: Row, cell: Cell) -> float | None:
        """The cell's speed over the baseline's; over several devices, as a share of so many baselines."""
        if self.devices == 1:
            return row.ratio(cell, self.baseline)
        alone = dataclasses.replace(row.workload, length=row.workload.length // self.devices)
        for other in self.rows:
            base = other.cell(self.baseline)
            if base is None or base is cell or (other.workload, other.mode) != (alone, row.mode):
                continue
            if base.status == cell.status == "measured":
                return row.rate(cell) / (self.devices * other.rate(base))
        return None

    @property
    def peers(self) -> tuple[str, ...]:
        """Names of all peers, in order."""
        return tuple(dict.fromkeys(c.peer for row in self.rows for c in row.cells))

    @property
    def wrong(self) -> int:
        """How many results were not right."""
        return sum(c.status == "wrong" for row in self.rows for c in row.cells)

    def to_json(self) -> str:
        """Everything, every sample included. Numbers are finite: an infinite error is null."""
        document = {"format": FORMAT, **dataclasses.asdict(self)}
        for row, shown in zip(self.rows, document["rows"], strict=True):
            for cell, entry in zip(row.cells, shown["cells"], strict=True):
                entry["verdicts"] = [
                    {"quantity": v.quantity, "error": _finite(v.error), "budget": _finite(v.budget)}
                    for v in cell.verdicts
                ]
                if cell.status == "measured":
                    entry |= {"median_seconds": cell.seconds, "flops_per_second": row.rate(cell)}
        return json.dumps(document, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Inverse of `to_json`.

        Raises:
            ValueError: the text is not such a report.
        """
        try:
            document = json.loads(text)
            if document.pop("format") != FORMAT:
                raise ValueError(f"of another format than {FORMAT}")
            rows = tuple(_row(row) for row in document.pop("rows"))
            return cls(**document | {"rows": rows, "command": tuple(document["command"])})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a result of this benchmark: {error!r}") from error


def _row(document: dict[str, Any]) -> Row:
    fields = dict(document["workload"])
    fields["window"] = None if fields["window"] is None else tuple(fields["window"])
    cells = tuple(_cell(cell) for cell in document["cells"])
    return Row(**document | {"workload": Workload(**fields), "cells": cells})


def _cell(document: dict[str, Any]) -> Cell:
    kept = {field.name: document[field.name] for field in dataclasses.fields(Cell)}
    verdicts = tuple(
        Verdict(v["quantity"], *(math.inf if v[n] is None else v[n] for n in ("error", "budget")))
        for v in document["verdicts"]
    )
    return Cell(**kept | {"verdicts": verdicts, "samples": tuple(document["samples"])})


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


def _share(verdict: Verdict) -> float:
    if not math.isfinite(verdict.error):
        return math.inf
    if verdict.error == 0:
        return 0.0
    return verdict.error / verdict.budget if verdict.budget > 0 else math.inf
