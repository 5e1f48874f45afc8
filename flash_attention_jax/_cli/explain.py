"""`explain`: what each implementation says of a problem, given by its shapes."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

import jax

from flash_attention_jax import _explain
from flash_attention_jax._arguments import FLOATS, PRECISIONS
from flash_attention_jax._cli import parse

Shape = tuple[int, ...]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declares the command."""
    parser = subparsers.add_parser(
        "explain",
        help="which implementation would run a problem, and why the others would not",
        description="Asks every implementation about a call of flash_attention, without computing it. "
        "A shape is written 1,8,4096,64.",
        epilog="example: explain --q 1,8,4096,64 --dtype bfloat16 --causal --window 1024,0 --platform cuda",
    )
    shape = {"type": _shape, "metavar": "SHAPE"}
    parser.add_argument("--q", required=True, help="(*batch, [N,] T, D)", **shape)
    parser.add_argument("--k", help="(*batch, [K,] S, D), by default q's", **shape)
    parser.add_argument("--v", help="(*batch, [K,] S, Dv), by default k's", **shape)
    parser.add_argument("--dtype", choices=FLOATS, default="float32", help="of q, k, v (default float32)")
    parser.add_argument("--bias", help="broadcastable to (*batch, N, T, S)", **shape)
    parser.add_argument("--bias-dtype", choices=FLOATS, help="by default that of q")
    parser.add_argument("--mask", help="broadcastable to (*batch, N, T, S)", **shape)
    parser.add_argument("--key-mask", help="broadcastable to (*batch, S)", **shape)
    parser.add_argument(
        "--segments", action="store_true", help="with segment ids (*batch, T) and (*batch, S)"
    )
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--window", type=parse.window, help="LEFT,RIGHT or one number; none is unbounded")
    parser.add_argument("--q-offset", type=_offset, help="a number, or `array` for one per batch element")
    parser.add_argument("--scale", type=float)
    parser.add_argument("--softcap", type=float)
    parser.add_argument("--precision", choices=PRECISIONS)
    parser.add_argument("--platform", help="cpu, cuda, rocm or tpu; by default this machine's")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command; the exit status is 2 where the library rejects the problem."""
    try:
        with jax.enable_x64("float64" in (args.dtype, args.bias_dtype)):
            explanation = _explain.explain(**_arguments(args))
    except (ValueError, TypeError) as rejection:
        print(f"error: {rejection}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(_document(explanation), indent=2))
    else:
        print(explanation)
    return 0


def _arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `flash_attention_jax.explain`."""
    k = args.q if args.k is None else args.k
    v = k if args.v is None else args.v
    batch = args.q[:-3]
    # The length is a slice, not an item, so that a shape without one reaches the library's own check.
    ids = tuple(_struct((*batch, *x[-2:-1]), "int32") for x in (args.q, k)) if args.segments else None
    offset = _struct(batch, "int32") if args.q_offset == "array" else args.q_offset
    return {
        "q": _struct(args.q, args.dtype),
        "k": _struct(k, args.dtype),
        "v": _struct(v, args.dtype),
        "key_mask": _struct(args.key_mask, "bool"),
        "bias": _struct(args.bias, args.bias_dtype or args.dtype),
        "mask": _struct(args.mask, "bool"),
        "segment_ids": ids,
        "q_offset": offset,
        **{name: getattr(args, name) for name in _OPTIONS},
    }


_OPTIONS = ("causal", "window", "scale", "softcap", "precision", "platform")


def _struct(shape: Shape | None, dtype: str) -> jax.ShapeDtypeStruct | None:
    return None if shape is None else jax.ShapeDtypeStruct(shape, dtype)


def _document(explanation: _explain.Explanation) -> dict[str, Any]:
    return {
        "problem": dataclasses.asdict(explanation.problem),
        "device": dataclasses.asdict(explanation.device),
        "refusals": explanation.refusals,
        "chosen": explanation.chosen,
    }


def _shape(text: str) -> Shape:
    sizes = text.split(",")
    if not all(x.isdecimal() for x in sizes):
        raise argparse.ArgumentTypeError(f"must be a shape such as 1,8,4096,64, was {text!r}")
    return tuple(map(int, sizes))


def _offset(text: str) -> int | str:
    return text if text == "array" else parse.integer(text)
