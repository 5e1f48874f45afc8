"""The command line: `python -m flash_attention_jax`, installed as `flash-attention-jax`."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence

import flash_attention_jax


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments; by default those of the process.

    Returns:
        The exit status: 0 for success, 1 where the results are not right, 2 for a wrong input.

    Raises:
        SystemExit: from argparse, for `--help` (0) and for wrong arguments (2).
    """
    if importlib.util.find_spec("rich") is None:
        print("error: the command line needs rich: pip install 'flash_attention_jax[cli]'", file=sys.stderr)
        return 2
    args = _parser().parse_args(argv)
    args.command_line = list(sys.argv[1:] if argv is None else argv)
    return args.run(args)


def _parser() -> argparse.ArgumentParser:
    # Here, since the commands import rich, which the library itself does without.
    from flash_attention_jax._cli import bench, check, demo, explain

    parser = argparse.ArgumentParser(
        prog="flash-attention-jax",
        description="Exact softmax attention in JAX that never stores the T x S matrix.",
    )
    parser.add_argument("--version", action="version", version=flash_attention_jax.__version__)
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (demo, check, bench, explain):
        command.add_parser(subparsers)
    return parser


if __name__ == "__main__":
    sys.exit(main())
