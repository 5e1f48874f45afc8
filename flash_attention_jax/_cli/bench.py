"""`bench`: time, memory and error of attention on this machine, ours beside everyone's."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from flash_attention_jax._arguments import FLOATS, PRECISIONS
from flash_attention_jax._bench import devices, machine, peers, plot, report
from flash_attention_jax._bench.measure import Settings, measure
from flash_attention_jax._bench.modes import MODES
from flash_attention_jax._bench.peers import Peer
from flash_attention_jax._bench.presets import PRESETS, Preset
from flash_attention_jax._bench.results import Report, Row
from flash_attention_jax._bench.verify import living
from flash_attention_jax._bench.workload import Inputs, Workload
from flash_attention_jax._cli import parse
from flash_attention_jax._cli.terminal import answer, progress

_REPEATS = 7
# Options that say what a problem is, with their defaults; a preset and a stored result have their own.
_PROBLEM: dict[str, Any] = {
    "batch": 1,
    "heads": 8,
    "kv_heads": None,
    "kv_length": None,
    "dtype": "float32",
    "precision": None,
    "window": None,
    "bias": None,
    "key_mask": None,
    "segments": None,
}
# Who is compared with, where nobody is named: the first of these that can run.
_BASELINES = ("jax.nn:cudnn", "torch:flash", "jax.nn:xla", "attention")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declares the command."""
    parser = subparsers.add_parser(
        "bench",
        help="time and memory on this machine, beside jax.nn, PyTorch and tokamax",
        description="Times attention in one process, the peers taking turns, each result first compared "
        "with float64. Rates count the visible pairs: 4 FLOP for each and each of the head dim's "
        "components forward, 3.5 times that forward and backward, 3 times for jvp. Memory is what a "
        "call takes beside its inputs. Exits with 1 where a result is wrong.",
        epilog="example: bench --lengths 1024,4096 --causal --peers flash_attention,jax.nn:xla --plot a.png",
    )
    _add_problem(parser)
    _add_run(parser)
    parser.set_defaults(run=run)


def _add_problem(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("problems")
    presets = "; ".join(f"{name}: {preset.summary}" for name, preset in PRESETS.items())
    group.add_argument("--preset", choices=tuple(PRESETS), help=f"a stored table: {presets}")
    numbers = {"type": _numbers, "metavar": "N,..."}
    group.add_argument("--lengths", help="queries and keys (default 512,1024,2048)", **numbers)
    group.add_argument("--head-dims", help="default 64", **numbers)
    group.add_argument("--causal", action="store_true", help="a query sees keys up to its own position")
    group.add_argument("--full", action="store_true", help="without causal; with --causal, both")
    group.add_argument("--batch", type=parse.positive, metavar="N", help="default 1")
    group.add_argument("--heads", type=_heads, metavar="N", help="query heads, or none (default 8)")
    number = {"type": parse.positive, "metavar": "N"}
    group.add_argument("--kv-heads", help="key/value heads (default: as many as heads)", **number)
    group.add_argument("--kv-length", help="keys (default: as many as queries)", **number)
    group.add_argument("--dtype", choices=FLOATS, help="default float32")
    group.add_argument("--precision", choices=PRECISIONS, help="of float32 products (default highest)")
    group.add_argument("--window", type=parse.window, help="LEFT,RIGHT or one number; none is unbounded")
    group.add_argument("--bias", metavar="AXES", help="a bias that has these axes of BNTS, such as NTS")
    group.add_argument(
        "--key-mask", type=float, metavar="PART", help="keep this part of the keys, as padding"
    )
    group.add_argument("--segments", help="documents of random length packed into each row", **number)


def _add_run(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("measuring")
    group.add_argument(
        "--modes", type=_modes, metavar="MODE,...", help=f"of {', '.join(MODES)} (default: the first two)"
    )
    group.add_argument(
        "--peers",
        type=_words,
        metavar="PEER,...",
        help=f"of {', '.join(peers.everyone())}; what stands before a colon asks for all of it, "
        "and flash_attention alone is its own choice (default: all that are installed and run here)",
    )
    group.add_argument(
        "--devices",
        type=parse.positive,
        metavar="N",
        help=f"divide the sequence over N devices by {', '.join(devices.NAMES)}, beside flash_attention on "
        "one at 1/N of the length; on a CPU so many are made, which share its cores",
    )
    group.add_argument("--baseline", metavar="PEER", help="the peer that ratios are over")
    group.add_argument(
        "--repeats", type=parse.positive, metavar="N", help=f"samples of each (default {_REPEATS})"
    )
    group.add_argument("--json", metavar="FILE", help="store machine, versions and every sample")
    group.add_argument("--plot", metavar="FILE", help="draw time and memory against length: .png, .svg, .pdf")
    group.add_argument(
        "--from",
        dest="stored",
        metavar="FILE",
        help="measure nothing: show a stored result; --lengths, --head-dims, --causal, --full, --modes "
        "and --peers choose from it",
    )


def run(args: argparse.Namespace) -> int:
    """Runs the command; the exit status is 1 where a result is wrong, 2 for a wrong input."""
    try:
        found = _stored(args) if args.stored is not None else _measured(args)
        report.show(answer(), found)
        if args.plot is not None:
            plot.draw(found, args.plot)
    except (ValueError, TypeError, OSError) as rejection:
        print(f"error: {rejection}", file=sys.stderr)
        return 2
    return 1 if found.wrong else 0


def _stored(args: argparse.Namespace) -> Report:
    """A stored report, as far as it was asked for."""
    _refuse(args, "from", (*_PROBLEM, "preset", "json", "repeats", "devices"))
    text = pathlib.Path(args.stored).read_text(encoding="utf-8")
    whole = Report.from_json(text)
    modes = args.modes or tuple(MODES)
    rows = [row for row in whole.rows if row.mode in modes and _chosen(args, row.workload)]
    if args.peers is not None:
        names = _matching(args.peers, whole.peers)
        rows = [dataclasses.replace(r, cells=tuple(c for c in r.cells if c.peer in names)) for r in rows]
    if not rows:
        raise ValueError(f"the options leave none of the problems in {args.stored}")
    shown = dataclasses.replace(whole, rows=tuple(rows))
    baseline = whole.baseline if args.baseline is None else args.baseline
    if args.baseline is not None and baseline not in shown.peers:
        raise ValueError(f"baseline must be one of {', '.join(shown.peers)}, got {baseline!r}")
    return dataclasses.replace(shown, baseline=baseline)


def _measured(args: argparse.Namespace) -> Report:
    """Measures what was asked for, and stores it where it should be."""
    if args.devices is not None:
        _refuse(args, "devices", ("baseline",))
        if args.plot is not None:
            raise ValueError("--plot cannot be given with --devices, whose lengths are of two kinds")
        machine.make_cpu_devices(args.devices)
    preset = None if args.preset is None else PRESETS[args.preset]
    if args.devices is None and machine.installed("torch"):
        asked = None if args.peers is None else peers.asked_for(args.peers)
        if asked is None or any(p.module == "torch" for p in asked):
            machine.share_the_gpu()
    where = machine.here()
    workloads = _workloads(args, preset, where.platform)
    modes = args.modes or (preset.modes if preset else tuple(MODES)[:2])
    if args.devices is not None:
        devices.check(workloads, args.devices)
    chosen = _peers(args, preset, workloads, modes, where)
    able = {p.name for p in chosen if any(p.refuses(w, modes[0], where) is None for w in workloads)}
    baseline = peers.AUTO if args.devices else _baseline(args, preset, [p.name for p in chosen], able)
    if args.plot is not None:
        pairs = itertools.product(workloads, modes)
        plot.check(args.plot, [Row(w, mode, 0, 0, 0, ()) for w, mode in pairs])
    for path in (args.json, args.plot):
        if path is not None and not pathlib.Path(path).absolute().parent.is_dir():
            raise ValueError(f"the directory of {path} must exist")
    for workload in workloads:
        living(Inputs(workload))
    begun = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    settings = Settings(where, args.repeats or _REPEATS)
    found = Report({}, tuple(args.command_line), begun, settings.repeats, baseline, (), args.devices or 1)
    for row in _rows(_tables(args, workloads, chosen), modes, settings):
        described = machine.describe(where) | {"threads": machine.threads()}
        found = dataclasses.replace(found, machine=described, rows=(*found.rows, row))
        if args.json is not None:  # After each row, so that nothing takes what was measured away.
            pathlib.Path(args.json).write_text(found.to_json(), encoding="utf-8")
    if not found.rows:
        raise ValueError("nothing was measured")
    return found


def _tables(
    args: argparse.Namespace, workloads: Sequence[Workload], chosen: Sequence[Peer]
) -> list[tuple[Workload, Sequence[Peer]]]:
    """Who runs which workloads: where it is over several devices, one alone runs its part before."""
    if args.devices is None:
        return [(w, chosen) for w in workloads]
    parts = (devices.of_one(w, args.devices) for w in workloads)
    pairs = zip(parts, workloads, strict=True)
    return [table for part, w in pairs for table in ((part, [devices.alone()]), (w, chosen))]


def _rows(
    tables: Sequence[tuple[Workload, Sequence[Peer]]], modes: Sequence[str], settings: Settings
) -> Iterator[Row]:
    """The rows under a progress bar; an interrupt ends them early, and what is there is kept."""
    with progress() as bar:
        total = sum(len(chosen) for _, chosen in tables) * len(modes) * settings.steps
        task = bar.add_task("bench", total=total, note="")
        told = dataclasses.replace(
            settings,
            note=lambda text: bar.update(task, note=text),
            advance=lambda steps: bar.advance(task, steps),
        )
        try:
            for workload, chosen in tables:
                inputs = Inputs(workload)
                for mode in modes:
                    yield measure(workload, mode, chosen, inputs, told)
        except KeyboardInterrupt:
            print("interrupted: what follows is what was measured before", file=sys.stderr)
        bar.update(task, note="")


def _workloads(args: argparse.Namespace, preset: Preset | None, platform: str) -> tuple[Workload, ...]:
    if preset is not None:
        _refuse(args, "preset", _PROBLEM)
        found = tuple(w for w in preset.on(platform) if _chosen(args, w))
        if not found:
            raise ValueError(f"the options leave none of the problems of the preset {args.preset}")
        return found
    given = {n: default if getattr(args, n) is None else getattr(args, n) for n, default in _PROBLEM.items()}
    given["heads"] = None if args.heads == 0 else given["heads"]
    if isinstance(given["window"], int):
        given["window"] = (given["window"], given["window"])
    causal = [False] * (args.full or not args.causal) + [True] * args.causal
    dims, lengths = args.head_dims or (64,), args.lengths or (512, 1024, 2048)
    return tuple(Workload(n, dim, causal=c, **given) for dim in dims for c in causal for n in lengths)


def _chosen(args: argparse.Namespace, w: Workload) -> bool:
    """Whether the options that choose among stored problems leave this one."""
    if args.causal != args.full and w.causal != args.causal:
        return False
    return w.length in (args.lengths or [w.length]) and w.head_dim in (args.head_dims or [w.head_dim])


def _refuse(args: argparse.Namespace, option: str, names: Sequence[str] | dict[str, Any]) -> None:
    given = [name for name in names if getattr(args, name) is not None]
    if given:
        raise ValueError(f"--{given[0].replace('_', '-')} cannot be given with --{option}, which has its own")


def _peers(args: argparse.Namespace, preset, workloads, modes, where) -> list[Peer]:
    if args.devices is not None:
        found = devices.everyone(args.devices)
        names = found if args.peers is None else _matching(args.peers, tuple(found))
        return [peer for name, peer in found.items() if name in names]
    if args.peers is not None:
        return peers.asked_for(args.peers)
    if preset is None or preset.peers is None:
        return peers.usual(workloads, modes[0], where)
    return [p for name in preset.peers if machine.installed((p := peers.everyone()[name]).module)]


def _baseline(args: argparse.Namespace, preset: Preset | None, names: Sequence[str], able: set[str]) -> str:
    """The peer that was named, or the usual one of those that are able to run."""
    if args.baseline is not None:
        if args.baseline not in names:
            raise ValueError(f"baseline must be one of {', '.join(names)}, got {args.baseline!r}")
        return args.baseline
    preferred = _BASELINES if preset is None else (preset.baseline, *_BASELINES)
    return next((name for name in preferred if name in able), names[0])


def _matching(words: Sequence[str], names: Sequence[str]) -> set[str]:
    """Names that were asked for, whole or by what stands before the colon."""
    found: set[str] = set()
    for word in words:
        own = {n for n in names if n == word} or {n for n in names if n.startswith(f"{word}:")}
        if not own:
            raise ValueError(f"peers must be of {', '.join(names)}, got {word!r}")
        found |= own
    return found


def _words(text: str) -> tuple[str, ...]:
    words = tuple(text.split(","))
    if not all(words) or len(set(words)) < len(words):
        raise argparse.ArgumentTypeError(f"must be names with commas between, each once, was {text!r}")
    return words


def _modes(text: str) -> tuple[str, ...]:
    words = _words(text)
    unknown = [word for word in words if word not in MODES]
    if unknown:
        raise argparse.ArgumentTypeError(f"must be of {', '.join(MODES)}, was {unknown[0]!r}")
    return words


def _numbers(text: str) -> tuple[int, ...]:
    numbers = tuple(map(parse.positive, text.split(",")))
    if len(set(numbers)) < len(numbers):
        raise argparse.ArgumentTypeError(f"must be different numbers, was {text!r}")
    return numbers


def _heads(text: str) -> int:
    """A number; 0 stands for `none`."""
    return 0 if text == "none" else parse.positive(text)
