"""What the commands share in reading their arguments: each says what it must be and what it was."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """A positive integer."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a positive integer, was {text!r}")
    return int(text)


def integer(text: str) -> int:
    """A whole number, which may be negative."""
    if not text.removeprefix("-").isdecimal():
        raise argparse.ArgumentTypeError(f"must be made of whole numbers, was {text!r}")
    return int(text)


def window(text: str) -> int | tuple[int | None, ...] | None:
    """LEFT,RIGHT or one number, `none` being unbounded."""
    sides = tuple(None if side == "none" else integer(side) for side in text.split(","))
    return sides[0] if len(sides) == 1 else sides
