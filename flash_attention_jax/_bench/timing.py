"""Seconds of calls: how one sample is taken, and in what order samples are.

A sample is the mean of as many calls as fill a given time. Peers take turns, one sample each round,
and each round begins with another peer, so that a drift of the machine meets them all alike.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

from flash_attention_jax._bench.program import Program

Clock = Callable[[], float]

# The least time that a sample fills. On a GPU it hides what the host does between calls; on a CPU it
# is far above the clock's resolution.
FILL = {"cpu": 0.02}
FILL_ELSEWHERE = 0.05
_MOST_CALLS = 10_000
# Calls shorter than this are preceded, at each sample, by one that does not count: caches, allocators
# and sleeping threads are then as this peer leaves them, not as the one before it did.
_SHORT = 0.5


class Timer(Protocol):
    """Takes samples."""

    def __call__(self, program: Program, calls: int) -> float:
        """Seconds for each of so many calls."""
        ...


@dataclasses.dataclass(frozen=True)
class HostTimer:
    """Waits for each call: for devices that begin a call at once, and would run several together."""

    clock: Clock = time.perf_counter

    def __call__(self, program: Program, calls: int) -> float:
        """See `Timer`."""
        begun = self.clock()
        for _ in range(calls):
            program.wait(program.start())
        return (self.clock() - begun) / calls


@dataclasses.dataclass(frozen=True)
class QueueTimer:
    """Starts all calls and waits once: the device runs them in order, and the host keeps ahead."""

    clock: Clock = time.perf_counter

    def __call__(self, program: Program, calls: int) -> float:
        """See `Timer`."""
        begun = self.clock()
        last = None
        for _ in range(calls):
            last = program.start()
        program.wait(last)
        return (self.clock() - begun) / calls


@dataclasses.dataclass(frozen=True)
class EventTimer:
    """Asks the device's own clock."""

    def __call__(self, program: Program, calls: int) -> float:
        """See `Timer`."""
        if program.events is None:
            raise ValueError("this program has no events")
        return program.events(calls) / calls


def timer_for(program: Program, platform: str, clock: Clock = time.perf_counter) -> Timer:
    """The timer for a program on a platform."""
    if program.events is not None:
        return EventTimer()
    return HostTimer(clock) if platform == "cpu" else QueueTimer(clock)


def calls_to_fill(timer: Timer, program: Program, fill: float) -> tuple[int, float]:
    """How many calls take `fill` seconds, at least one, and the seconds that one takes."""
    calls = 1
    while True:
        seconds = timer(program, calls)
        needed = max(1, min(_MOST_CALLS, math.ceil(fill / seconds) if seconds > 0 else _MOST_CALLS))
        if needed <= calls or calls > 1:  # The estimate from one call alone holds what that waits for.
            return needed, seconds
        calls = needed


def host_seconds(program: Program, clock: Clock = time.perf_counter, repeats: int = 5) -> float:
    """The median time in which the host starts one call on an idle device.

    Where it is less than a call takes, calls in a queue show the device's time alone.
    """
    taken = []
    for _ in range(repeats):
        begun = clock()
        started = program.start()
        taken.append(clock() - begun)
        program.wait(started)
    return statistics.median(taken)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A program with its timer and the number of calls of a sample."""

    program: Program
    timer: Timer
    calls: int
    estimate: float

    def sample(self) -> float:
        """Seconds for one call."""
        with self.program.session():
            if self.estimate < _SHORT:
                self.program.wait(self.program.start())
            return self.timer(self.program, self.calls)


def prepare(program: Program, timer: Timer, fill: float) -> Entry:
    """Finds how many calls of a program, which has run before, make a sample."""
    with program.session():
        calls, estimate = calls_to_fill(timer, program, fill)
    return Entry(program, timer, calls, estimate)


def rounds(entries: Mapping[str, Entry], repeats: int) -> Iterator[tuple[str, float | Exception]]:
    """Samples of all entries, `repeats` of each, interleaved.

    An entry that raises, out of memory say, yields the exception and takes part no more.
    """
    names = list(entries)
    failed: set[str] = set()
    for number in range(repeats):
        turn = number % len(names) if names else 0
        for name in names[turn:] + names[:turn]:
            if name in failed:
                continue
            try:
                sample = entries[name].sample()
            except Exception as error:  # Whatever a foreign framework raises.
                failed.add(name)
                sample = error
            yield name, sample
