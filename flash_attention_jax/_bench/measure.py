"""One workload in one mode: every peer is prepared, checked, and timed in turn with the others."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable, Sequence

import jax

from flash_attention_jax._bench import timing, torch_peers
from flash_attention_jax._bench.peers import Peer
from flash_attention_jax._bench.program import CannotRunError, Program, Where
from flash_attention_jax._bench.results import Cell, Row
from flash_attention_jax._bench.timing import Clock, Entry
from flash_attention_jax._bench.verify import Truth, budgets_allowed, truth
from flash_attention_jax._bench.workload import Inputs, Workload

# A call that takes less than this on a device with a queue is also timed within a program that makes
# many: what then differs is the cost of starting it.
_LOOP_BELOW = 2e-3
_LOOP_CALLS = 50


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        repeats: samples of each peer.
        fill: seconds that a sample fills; None is the platform's.
        loops: whether to time calls within one program too; None is where the platform has a queue.
        note: is told what happens now.
        advance: is told of each step done, of `steps` for each peer.
    """

    where: Where
    repeats: int = 7
    fill: float | None = None
    loops: bool | None = None
    note: Callable[[str], None] = lambda text: None
    advance: Callable[[int], None] = lambda steps: None
    clock: Clock = time.perf_counter

    @property
    def steps(self) -> int:
        """Progress steps for each peer: preparing it, and each sample."""
        return 1 + self.repeats

    @property
    def queued(self) -> bool:
        """Whether the platform runs calls in a queue, beside the host."""
        return self.where.platform != "cpu"


def measure(workload: Workload, mode: str, peers: Sequence[Peer], inputs: Inputs, settings: Settings) -> Row:
    """Measures peers on a workload.

    Args:
        inputs: the workload's; kept by the caller from mode to mode.

    Raises:
        ValueError: no query sees a key.
    """
    with jax.enable_x64(workload.dtype == "float64"):
        settings.note(f"{workload.label}, {mode}: float64")
        right = truth(workload, mode, inputs)
        cells: dict[str, Cell] = {}
        entries: dict[str, Entry] = {}
        for peer in peers:
            settings.note(f"{workload.label}, {mode}: {peer.name}")
            cell, entry = _checked(peer, workload, mode, inputs, right, settings)
            cells[peer.name] = cell
            if entry is not None:
                entries[peer.name] = entry
            settings.advance(1 if entry is not None else settings.steps)
        _sample(cells, entries, f"{workload.label}, {mode}", settings)
    entries.clear()
    gc.collect()  # Programs hold themselves in cycles, and their memory with them.
    torch_peers.release()
    flops = workload.flops(mode)
    return Row(workload, mode, workload.pairs, flops, right.rows.size, tuple(cells.values()))


def _checked(
    peer: Peer, workload: Workload, mode: str, inputs: Inputs, right: Truth, settings: Settings
) -> tuple[Cell, Entry | None]:
    """A peer's cell before any sample, and what to sample, or None where there is nothing."""
    reason = peer.refuses(workload, mode, settings.where)
    if reason is not None:
        return Cell(peer.name, "cannot run", reason), None
    try:
        program = peer.prepare(workload, mode, inputs, settings.where)
        verdicts = right.judge(program.results(right.dout))
        cell = Cell(
            peer.name,
            "measured",
            verdicts=verdicts,
            memory=program.memory(),
            compile_seconds=program.compile_seconds,
            note=program.note,
        )
        if cell.worst > budgets_allowed(workload, peer.ours):
            return dataclasses.replace(cell, status="wrong", reason=_wrong(cell)), None
        entry = _entry(program, settings)
        return dataclasses.replace(cell, calls=entry.calls, **_overheads(entry, settings)), entry
    except Exception as error:  # Whatever a foreign framework raises.
        return Cell(peer.name, "cannot run", reason_of(error)), None


def _entry(program: Program, settings: Settings) -> Entry:
    platform = settings.where.platform
    timer = timing.timer_for(program, platform, settings.clock)
    fill = settings.fill
    if fill is None:
        fill = timing.FILL.get(platform, timing.FILL_ELSEWHERE)
    return timing.prepare(program, timer, fill)


def _overheads(entry: Entry, settings: Settings) -> dict[str, float]:
    """Where the device has a queue: what starting a call costs, seen in two ways."""
    program, found = entry.program, {}
    if settings.queued:
        with program.session():
            found["host_seconds"] = timing.host_seconds(program, settings.clock)
    loops = settings.queued if settings.loops is None else settings.loops
    if loops and program.loop is not None and entry.estimate < _LOOP_BELOW:
        looped = program.loop(_LOOP_CALLS)
        looped.wait(looped.start())
        taken = min(timing.HostTimer(settings.clock)(looped, 1) for _ in range(3))
        found["loop_seconds"] = taken / _LOOP_CALLS
    return found


def _sample(cells: dict[str, Cell], entries: dict[str, Entry], label: str, settings: Settings) -> None:
    """Fills in the samples of the cells that have an entry."""
    samples: dict[str, list[float]] = {name: [] for name in entries}
    for name, sample in timing.rounds(entries, settings.repeats):
        settings.note(f"{label}: {name}")
        if isinstance(sample, Exception):
            cells[name] = Cell(name, "cannot run", reason_of(sample))
            settings.advance(settings.repeats - len(samples.pop(name)))
        else:
            samples[name].append(sample)
            settings.advance(1)
    for name, taken in samples.items():
        cells[name] = dataclasses.replace(cells[name], samples=tuple(taken))


def _wrong(cell: Cell) -> str:
    over = [
        f"{v.quantity} errs by {v.error:.2g}, budget {v.budget:.2g}" for v in cell.verdicts if not v.within
    ]
    return "; ".join(over)


_OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "out of memory", "Out of memory", "can't allocate memory")


def reason_of(error: Exception) -> str:
    """Why a peer cannot run, in a line, from what it raised."""
    if isinstance(error, CannotRunError):
        return str(error)
    text = str(error) or type(error).__name__
    if isinstance(error, MemoryError) or any(sign in text for sign in _OUT_OF_MEMORY):
        return "out of memory"
    line = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    return line if len(line) <= 200 else line[:197] + "..."
