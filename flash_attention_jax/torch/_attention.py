"""Attention of PyTorch tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import jax
import numpy as np
import torch
from torch import Tensor

from flash_attention_jax._api import Window
from flash_attention_jax._arguments import fail
from flash_attention_jax.torch._crossing import other_layout
from flash_attention_jax.torch._operator import ARRAYS, call, encode

SegmentIds = Tensor | tuple[Tensor, Tensor] | None


@overload
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    segment_ids: SegmentIds = None,
    causal: bool = False,
    window: Window = None,
    q_offset: int | Tensor | None = None,
    scale: float | Tensor | None = None,
    softcap: float | None = None,
    precision: str | jax.lax.Precision | None = None,
    deterministic: bool | None = None,
    implementation: str | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    segment_ids: SegmentIds = None,
    causal: bool = False,
    window: Window = None,
    q_offset: int | Tensor | None = None,
    scale: float | Tensor | None = None,
    softcap: float | None = None,
    precision: str | jax.lax.Precision | None = None,
    deterministic: bool | None = None,
    implementation: str | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    segment_ids: SegmentIds = None,
    causal: bool = False,
    window: Window = None,
    q_offset: int | Tensor | None = None,
    scale: float | Tensor | None = None,
    softcap: float | None = None,
    precision: str | jax.lax.Precision | None = None,
    deterministic: bool | None = None,
    implementation: str | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`flash_attention_jax.flash_attention` of PyTorch tensors.

    The meaning of every argument is the same there, and so are accuracy and memory. Tensors cross
    by DLPack, without a copy where they are contiguous, as they are or with heads and positions
    exchanged (`projection.unflatten(-1, (N, D)).transpose(1, 2)`). `torch.autocast` leaves them as
    they are. Backward passes run on out and lse with no
    second forward pass; derivatives exist to every order and in both modes, and `torch.func`'s
    transforms apply. It is an operator of `torch.library`, so that `torch.compile(fullgraph=True)`
    and `torch.export` take models that contain it; numbers are Python's there, not NumPy's.

    Args:
        q: queries (*batch, [N,] T, D), float16, bfloat16, float32 or float64.
        k: keys (*batch, [K,] S, D), of q's dtype. K divides N (grouped-query attention).
        v: values (*batch, [K,] S, Dv), of q's dtype.
        key_mask: bool or 0/1, broadcastable to (*batch, S). Keys with 0 are hidden.
        bias: floating, broadcastable to (*batch, N, T, S), added to the logits.
        mask: bool, broadcastable to (*batch, N, T, S). Pairs with False are hidden.
        segment_ids: integers (*batch, T) where T = S, or a pair ((*batch, T), (*batch, S)).
        causal: whether a query sees only keys at or before its position; the last query stands at
            the last key, unless `q_offset` says otherwise.
        window: (left, right): key j is visible when -left <= j - position(i) <= right. An int w
            means (w, w), None on a side is unbounded.
        q_offset: position of the first query among the keys, an int or an integer tensor that
            broadcasts to the batch, of a magnitude below 2**30 (the values of a tensor are not
            checked). Defaults to S - T.
        scale: of the logits, a number or a tensor of one element and no axes, which may require a
            gradient. Defaults to D ** -0.5.
        softcap: c makes the logits c * tanh(logits / c) before `bias` is added.
        precision: of float32 matrix products: "highest" (also None), "high" or "default".
        deterministic: whether gradients must have the same bits on every run; None is
            `torch.are_deterministic_algorithms_enabled()`.
        implementation: a name from `flash_attention_jax.explain`, or None for the best.
        return_lse: whether to return the log of the sum of exponentials as well.

    Returns:
        out (*batch, [N,] T, Dv) in q's dtype; with `return_lse` the pair (out, lse), lse
        (*batch, [N,] T) in float32 (float64 for float64).

    Raises:
        ValueError: a shape or a value is wrong, or the tensors are on several devices.
        TypeError: a dtype or a type is wrong.
        RuntimeError: JAX does not see the device of the tensors.
        Unsupported: `implementation` cannot run this problem. None always works.

    Example:
        >>> out = flash_attention(q, k, v, causal=True)
    """
    check_tensors({"q": q, "k": k, "v": v}, {"bias": bias, "mask": mask, "key_mask": key_mask})
    check_layouts({"q_offset": q_offset, "scale": scale})
    given = (q, k, v, bias, mask, key_mask, *_pair_of_segments(segment_ids, q, k))
    options: dict[str, Any] = {"causal": causal, "window": window, "softcap": softcap}
    options |= {"precision": precision, "deterministic": deterministic, "implementation": implementation}
    out, lse = attend(given, q_offset, scale, options)
    return (out, lse) if return_lse else out


def check_tensors(needed: dict[str, Any], others: dict[str, Any]) -> None:
    """Rejects what is no strided tensor; the others may be None."""
    for name, x in (needed | others).items():
        if not isinstance(x, Tensor) and (x is not None or name in needed):
            fail(name, "a torch.Tensor", type(x).__name__, TypeError)
    check_layouts(needed | others)


def check_layouts(named: dict[str, Any]) -> None:
    """Rejects tensors that have no shape and strides to speak of."""
    for name, x in named.items():
        layout = other_layout(x) if isinstance(x, Tensor) else None
        if layout is not None:
            fail(name, "a strided tensor", layout, TypeError)


def _pair_of_segments(segment_ids: Any, q: Tensor, k: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Ids of queries and of keys."""
    if segment_ids is None:
        return None, None
    pair = segment_ids if isinstance(segment_ids, tuple | list) else (segment_ids, segment_ids)
    must = "a tensor or a pair of tensors (of queries, of keys)"
    if len(pair) != 2:
        fail("segment_ids", must, f"{len(pair)} items")
    for x in pair:
        if not isinstance(x, Tensor):
            fail("segment_ids", must, type(x).__name__, TypeError)
        check_layouts({"segment_ids": x})
    if isinstance(segment_ids, Tensor) and q.ndim > 1 and k.ndim > 1 and q.shape[-2] != k.shape[-2]:
        lengths = f"T = {q.shape[-2]} and S = {k.shape[-2]}"
        fail("segment_ids", "a pair (of queries, of keys) where T and S differ", f"one tensor, {lengths}")
    return pair[0], pair[1]


def attend(given: Sequence[Any], q_offset: Any, scale: Any, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Calls the operator: out and lse.

    Args:
        given: the tensors or None, in the order of `ARRAYS` up to `q_offset`.
        q_offset: a number, a tensor or None.
        scale: a number, a tensor or None.
        options: the other arguments of `flash_attention`.
    """
    if options.get("deterministic") is None:
        options["deterministic"] = torch.are_deterministic_algorithms_enabled()
    if torch.compiler.is_compiling():
        q_offset, scale, options = _without_symbols(q_offset, scale, options, given[0].device)
    offset_and_scale = {"q_offset": q_offset, "scale": scale}
    options |= {name: x for name, x in offset_and_scale.items() if not isinstance(x, Tensor)}
    every = [*given, *(x if isinstance(x, Tensor) else None for x in (q_offset, scale))]
    transposed = _lie_by_position(*every[:3])
    if transposed:
        every[:3] = [x.transpose(-3, -2) for x in every[:3]]
        options["order"] = "BTND"
    names = tuple(name for name, x in zip(ARRAYS, every, strict=True) if x is not None)
    set_options = tuple((name, x) for name, x in options.items() if not _is_default(name, x))
    program = _described(names, set_options)
    out, lse = call(program, [x for x in every if x is not None])
    return out.transpose(-3, -2) if transposed else out, lse


def _is_default(name: str, x: Any) -> bool:
    """Whether an option says nothing; False of what is no switch is an error, found with the others."""
    return x is None or (x is False and name in ("causal", "deterministic"))


def _lie_by_position(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether heads follow one another within a position, as a projection leaves them.

    Then q, k and v are attended to in that order, and out has it as well: nothing is transposed.
    Shapes that do not fit are left as they are, for messages that show them.
    """
    if not all(x.ndim > 2 and x.stride(-3) < x.stride(-2) for x in (q, k, v)):
        return False
    same = q.shape[:-3] == k.shape[:-3] and q.shape[-1] == k.shape[-1] and k.shape[:-1] == v.shape[:-1]
    return same and k.shape[-3] > 0 and q.shape[-3] % k.shape[-3] == 0


def _without_symbols(
    q_offset: Any, scale: Any, options: dict[str, Any], device: torch.device
) -> tuple[Any, Any, dict[str, Any]]:
    """Numbers that depend on sizes, made constants of what is compiled; an offset is made a tensor."""
    from torch.fx.experimental.symbolic_shapes import guard_scalar, has_static_value

    def constant(x: Any) -> Any:
        is_number = isinstance(x, int | float | torch.SymInt | torch.SymFloat)
        return guard_scalar(x) if is_number else x  # pyright: ignore[reportArgumentType]

    if isinstance(q_offset, int | torch.SymInt) and not has_static_value(q_offset):
        q_offset = torch.full((), q_offset, dtype=torch.int32, device=device)  # pyright: ignore
    if isinstance(options.get("window"), tuple | list):
        options["window"] = tuple(constant(side) for side in options["window"])
    return constant(q_offset), constant(scale), {name: constant(x) for name, x in options.items()}


@torch.compiler.assume_constant_result
def _described(names: tuple[str, ...], options: tuple[tuple[str, Any], ...]) -> str:
    return encode({"attend": {name: _plain(name, x) for name, x in options}, "arrays": names})


def _plain(name: str, x: Any) -> Any:
    """An option as JSON has it."""
    x = x.item() if isinstance(x, np.generic) else x
    x = x.name.lower() if isinstance(x, jax.lax.Precision) else x
    if isinstance(x, tuple | list):
        return [_plain(name, side) for side in x]
    if x is not None and not isinstance(x, bool | int | float | str):
        fail(name, "None, a number, a string, a bool or a pair", type(x).__name__, TypeError)
    return x
