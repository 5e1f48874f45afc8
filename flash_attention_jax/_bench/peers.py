"""Who is measured: every way to compute attention that can be asked for by name.

A name is `who` or `who:how`, and `who` alone asks for all of that name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from flash_attention_jax._bench import jax_peers, torch_peers
from flash_attention_jax._bench.machine import installed
from flash_attention_jax._bench.program import Program, Where
from flash_attention_jax._bench.workload import Inputs, Workload
from flash_attention_jax._dispatch import IMPLEMENTATIONS

AUTO = "flash_attention"


@dataclasses.dataclass(frozen=True)
class Peer:
    """One way to compute attention.

    Attributes:
        name: "torch:flash", say.
        refuses: why it cannot run a workload in a mode somewhere, or None if it may; what only trying
            shows is raised by `prepare` or by the program.
        prepare: makes it ready for a workload and a mode.
        module: what must be installed.
        ours: whether it must keep the error budget of the library (see `verify`).
    """

    name: str
    refuses: Callable[[Workload, str, Where], str | None]
    prepare: Callable[[Workload, str, Inputs, Where], Program]
    module: str = "jax"
    ours: bool = False


def everyone() -> dict[str, Peer]:
    """All peers by name, installed or not."""
    ours = {AUTO: None} | {f"{AUTO}:{name}": name for name in IMPLEMENTATIONS if name != "reference"}
    peers = [_jax(name, jax_peers.flash(which), ours=True) for name, which in ours.items()]
    peers.append(_jax("attention", jax_peers.PLAIN, ours=True))
    peers += [_jax(f"jax.nn:{how}", jax_peers.jax_nn(how)) for how in ("xla", "cudnn")]
    peers += [
        Peer(f"torch:{how}", torch_peers.refusal(how), torch_peers.preparer(how), "torch")
        for how in torch_peers.BACKENDS
    ]
    peers += [_jax(f"tokamax:{how}", jax_peers.tokamax(how), module="tokamax") for how in jax_peers.TOKAMAX]
    return {peer.name: peer for peer in peers}


def _jax(name: str, function: jax_peers.Function, module: str = "jax", ours: bool = False) -> Peer:
    return Peer(name, function.refuses, function.prepare, module, ours)


def asked_for(words: Sequence[str]) -> list[Peer]:
    """The peers of names that a user gave.

    Raises:
        ValueError: no peer has such a name, or what it needs is not installed.
    """
    peers, chosen = everyone(), {}
    for word in words:
        found = [p for p in peers.values() if p.name == word] or [
            p for p in peers.values() if p.name.startswith(f"{word}:")
        ]
        if not found:
            raise ValueError(
                f"peers must be of {', '.join(peers)} or what stands before a colon, got {word!r}"
            )
        missing = next((p.module for p in found if not installed(p.module)), None)
        if missing is not None:
            raise ValueError(f"peers must be installed, got {word!r} without {missing}")
        chosen |= {p.name: p for p in found}
    return list(chosen.values())


def usual(workloads: Iterable[Workload], mode: str, where: Where) -> list[Peer]:
    """Who is measured if nobody is asked for: all that are installed and take some workload.

    An implementation of ours that the automatic choice always takes is not measured twice.
    """
    workloads = list(workloads)
    taken = {f"{AUTO}:{jax_peers.automatic(w)}" for w in workloads}
    redundant = taken if len(taken) == 1 else set()
    return [
        peer
        for peer in everyone().values()
        if peer.name not in redundant
        and installed(peer.module)
        and any(peer.refuses(w, mode, where) is None for w in workloads)
    ]
