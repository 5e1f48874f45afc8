"""What the commands share: the progress bar and the description of the machine.

Progress goes to stderr, so that stdout holds the answer alone, and only where that is a terminal.
"""

from __future__ import annotations

import platform

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


def progress() -> Progress:
    """A progress bar with the time left; a task's field `note` says what runs now."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("left"),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=not console.is_terminal,
    )


def answer() -> Console:
    """The console of stdout, which shows text as it is: no markup, no guessed colours."""
    return Console(highlight=False, markup=False, emoji=False)


def machine() -> dict[str, str]:
    """What computes: platform and kind of the first device, versions of JAX and Python."""
    device = jax.local_devices()[0]
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


def machine_line() -> str:
    """`machine` in words."""
    m = machine()
    device = m["device"] if m["device"] == m["platform"] else f"{m['device']} ({m['platform']})"
    return f"{device}, JAX {m['jax']}, Python {m['python']}"
