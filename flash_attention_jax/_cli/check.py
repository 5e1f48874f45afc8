"""`check`: every implementation that can run here, against the oracle, over the table of cases."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from rich import box
from rich.console import Console
from rich.table import Table

import flash_attention_jax
from flash_attention_jax._cli.terminal import answer, machine, machine_line, progress
from flash_attention_jax._dispatch import IMPLEMENTATIONS
from flash_attention_jax._explain import explain
from flash_attention_jax.testing import CASES, Case, Verdict, judge_implementation, select


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of one case with one implementation: a refusal, or verdicts."""

    implementation: str
    case: str
    refused: str | None
    verdicts: tuple[Verdict, ...] = ()

    @property
    def failures(self) -> tuple[Verdict, ...]:
        """The verdicts over their budgets."""
        return tuple(v for v in self.verdicts if not v.within)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declares the command."""
    parser = subparsers.add_parser(
        "check",
        help="judge every implementation on this machine against float64",
        description="Compares out, lse and every gradient with plain attention in float64, case by case: "
        "each may err by twice what the plain formula errs by in the same dtype, plus one rounding. "
        "Exits with 1 where a result is over its budget.",
    )
    parser.add_argument(
        "--case",
        dest="cases",
        type=_cases,
        default=CASES,
        metavar="PATTERN",
        help=f"only the cases whose name contains PATTERN (of {len(CASES)})",
    )
    parser.add_argument(
        "--dtype",
        choices=("float16", "bfloat16", "float32", "float64"),
        help="all cases in this dtype: those of float32 are turned into it, those of others left out",
    )
    parser.add_argument(
        "--part",
        type=_part,
        default=(1, 1),
        metavar="I/N",
        help="only every Nth case, beginning with the Ith: N processes share the table",
    )
    parser.add_argument("--implementation", choices=tuple(IMPLEMENTATIONS), help="only this one")
    parser.add_argument("--json", action="store_true", help="print all verdicts as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command; the exit status is 1 where a result is over its budget."""
    names = tuple(IMPLEMENTATIONS) if args.implementation is None else (args.implementation,)
    part, parts = args.part
    cases = args.cases if args.dtype is None else _in_dtype(args.cases, args.dtype)
    cases = cases[part - 1 :: parts]
    if not cases:
        print("error: no case of that name and dtype is in that part", file=sys.stderr)
        return 2
    outcomes = list(_outcomes(cases, names))
    passed = not any(o.failures for o in outcomes)
    if args.json:
        print(json.dumps(_document(outcomes, passed), indent=2, allow_nan=False))
    else:
        _show(answer(), outcomes, names)
    return 0 if passed else 1


def _outcomes(cases: Sequence[Case], names: Sequence[str]) -> Iterator[Outcome]:
    with progress() as bar:
        task = bar.add_task("check", total=len(cases) * len(names), note="")
        for case in cases:
            refusals = refusals_of(case)
            for name in names:
                bar.update(task, note=f"{case.name}, {name}")
                refused = refusals[name]
                verdicts = () if refused else tuple(judge_implementation(name, case))
                yield Outcome(name, case.name, refused, verdicts)
                bar.advance(task)
        bar.update(task, note="")


def refusals_of(case: Case) -> dict[str, str | None]:
    """Why each implementation refuses a case on this machine, or None where it runs."""
    with jax.enable_x64(case.dtype == "float64"):
        return explain(**case.arguments()).refusals


def ratio(verdict: Verdict) -> float:
    """The error as a share of its budget; none at all is 0, even of a budget of 0."""
    if verdict.error == 0:
        return 0.0
    return verdict.error / verdict.budget if verdict.budget > 0 else math.inf


def _document(outcomes: Sequence[Outcome], passed: bool) -> dict[str, Any]:
    """The JSON. Its numbers are finite: an infinite error or budget is null."""
    results = [
        {
            "implementation": o.implementation,
            "case": o.case,
            "refused": o.refused,
            "verdicts": [
                {
                    "quantity": v.quantity,
                    "error": _finite(v.error),
                    "budget": _finite(v.budget),
                    "within": v.within,
                }
                for v in o.verdicts
            ],
        }
        for o in outcomes
    ]
    version = {"flash_attention_jax": flash_attention_jax.__version__}
    return machine() | version | {"passed": passed, "results": results}


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


def _show(console: Console, outcomes: Sequence[Outcome], names: Sequence[str]) -> None:
    cases = len({o.case for o in outcomes})
    console.print(f"{cases} case{'s' * (cases != 1)} on {machine_line()}")
    console.print(_summary(outcomes, names))
    if any(o.refused for o in outcomes):
        console.print(_refusals(outcomes))
    failures = sum(len(o.failures) for o in outcomes)
    if failures:
        console.print(_failures(outcomes))
    total = sum(len(o.verdicts) for o in outcomes)
    if failures:
        console.print(f"{failures} of {total} results are over their error budgets.", style="bold red")
    elif total:
        console.print(f"All {total} results are within their error budgets.", style="green")
    else:
        console.print("Nothing was judged: every case was refused.", style="yellow")


def _summary(outcomes: Sequence[Outcome], names: Sequence[str]) -> Table:
    table = _table("implementation")
    for column in ("passed", "over\nbudget", "refused", "worst\nerror/budget"):
        table.add_column(column, justify="right")
    table.add_column("where", overflow="fold")
    for name in names:
        own = [o for o in outcomes if o.implementation == name]
        refused, failed = sum(o.refused is not None for o in own), sum(bool(o.failures) for o in own)
        judged = [(ratio(v), f"{v.quantity} of {o.case}") for o in own for v in o.verdicts]
        worst, where = max(judged, default=(None, ""))
        shown = "" if worst is None else f"{worst:.2f}"
        counts = (str(len(own) - refused - failed), str(failed), str(refused))
        table.add_row(name, *counts, shown, where, style="bold red" if failed else None)
    return table


def _refusals(outcomes: Sequence[Outcome]) -> Table:
    """The reasons, each with all the cases that it stands for."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for o in outcomes:
        if o.refused is not None:
            reasons.setdefault((o.implementation, o.refused), []).append(o.case)
    table = _table("implementation", title="Refused")
    table.add_column("because", overflow="fold")
    table.add_column("cases", overflow="fold")
    for (name, reason), cases in reasons.items():
        table.add_row(name, reason, ", ".join(cases))
    return table


def _failures(outcomes: Sequence[Outcome]) -> Table:
    table = _table("implementation", "case", "quantity", title="Over budget")
    table.add_column("error", justify="right")
    table.add_column("budget", justify="right")
    for o in outcomes:
        for v in o.failures:
            error = f"{v.error:.3g}" if math.isfinite(v.error) else "NaN or inf differ"
            table.add_row(o.implementation, o.case, v.quantity, error, f"{v.budget:.3g}")
    return table


def _table(*names: str, title: str | None = None) -> Table:
    """A table that begins with columns of names, which stay whole in a narrow terminal."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for name in names:
        table.add_column(name, no_wrap=True)
    return table


def _in_dtype(cases: Sequence[Case], dtype: str) -> tuple[Case, ...]:
    """The cases of a dtype and those of float32, all in that dtype."""
    return tuple(dataclasses.replace(c, dtype=dtype) for c in cases if c.dtype in ("float32", dtype))


def _part(text: str) -> tuple[int, int]:
    try:
        part, parts = map(int, text.split("/"))
    except ValueError:
        part, parts = 0, 0
    if not 1 <= part <= parts:
        raise argparse.ArgumentTypeError(f"must be I/N with 1 <= I <= N, got {text!r}")
    return part, parts


def _cases(pattern: str) -> tuple[Case, ...]:
    cases = tuple(select(pattern))
    if not cases:
        raise argparse.ArgumentTypeError(f"no case has {pattern!r} in its name")
    return cases
