"""Programs as functions that torch differentiates, in both modes, and batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import _add_batch_dim, _remove_batch_dim  # pyright: ignore[reportPrivateImportUsage]
from torch._C._autograd import _top_saved_tensors_default_hooks
from torch._C._functorch import is_legacy_batchedtensor as is_batched
from torch.autograd import forward_ad

from flash_attention_jax.torch._crossing import is_differentiable
from flash_attention_jax.torch._program import Frame, Program, pullback

Tensors = Sequence[torch.Tensor]


def apply(program: Program, frame: Frame, tensors: Tensors) -> tuple[torch.Tensor, ...]:
    """Calls a program so that torch knows its derivatives.

    Raises:
        RuntimeError: the tensors belong to several nested batches of `is_grads_batched`.
    """
    if any(map(is_batched, tensors)):
        return _apply_to_batch(program, frame, tensors)
    wrt = ()
    if torch.is_grad_enabled():
        wrt = tuple(i for i, x in enumerate(tensors) if x.requires_grad)
    # A fifth of the time of a small call is torch's way through `Apply`.
    if not wrt and not torch._C._are_functorch_transforms_active() and not _has_tangents(tensors):
        return program.run(frame, tensors)
    # Checkpoints and other hooks decide about the memory of what is saved for the backward pass, and
    # residuals are not saved by way of them: it then starts from the tensors alone.
    if _top_saved_tensors_default_hooks(True) is None:
        frame.wrt = wrt
    return Apply.apply(program, frame, *tensors)  # pyright: ignore[reportReturnType]


_LEVELS = 64  # as many as torch has


def _apply_to_batch(program: Program, frame: Frame, tensors: Tensors) -> tuple[torch.Tensor, ...]:
    """The batched program, of the tensors that lie in a batch.

    It is a batch of the vmap that `is_grads_batched` and `torch.autograd.functional` have to
    themselves, which does not ask `Apply.vmap`.
    """
    level = _level(next(x for x in tensors if is_batched(x)))
    whole = [_remove_batch_dim(x, level, 1, 0) if is_batched(x) else x for x in tensors]
    if any(map(is_batched, whole)):
        _refuse_nested()
    dims = tuple(0 if is_batched(x) else None for x in tensors)
    inner = frame.another()
    results = apply(program.vmap(dims), inner, whole)
    frame.tree = inner.tree
    return tuple(_add_batch_dim(x, 0, level) for x in results)


def _level(x: torch.Tensor) -> int:
    """Of the one batch that a tensor belongs to; threads of the backward pass are not told."""
    for level in range(1, _LEVELS + 1):
        if not is_batched(_remove_batch_dim(x, level, 1, 0)):
            return level
    _refuse_nested()


def _refuse_nested() -> NoReturn:
    raise RuntimeError(
        "batches of is_grads_batched or vectorize=True must not be nested here: "
        "use torch.func.vmap, torch.func.jacrev or torch.func.hessian"
    )


def _has_tangents(tensors: Tensors) -> bool:
    return any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


class Apply(torch.autograd.Function):
    """A program of tensors.

    An ordinary backward pass runs on the residuals of the forward pass. Where the backward pass is
    itself differentiated, or any tangent is around, it is the program `vjp` of all that the forward
    pass read, which torch then sees as a function of it; so derivatives exist to every order.
    """

    @staticmethod
    def forward(program: Program, frame: Frame, *tensors: torch.Tensor) -> Any:  # pyright: ignore
        """The results of the program."""
        return program.run(frame, tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keeps what the derivatives read."""
        ctx.program, ctx.frame, *tensors = inputs
        ctx.pull, ctx.frame.pull = ctx.frame.pull, None
        ctx.wrt = ctx.frame.wrt
        ctx.count = len(tensors)
        read = *tensors, *(output if ctx.program.reads_results else ())
        ctx.save_for_backward(*read)
        ctx.save_for_forward(*read)
        ctx.floating = tuple(i for i, x in enumerate(output) if is_differentiable(x))
        ctx.results = len(output)
        ctx.mark_non_differentiable(*(x for x in output if not is_differentiable(x)))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor | None) -> Any:
        """The gradients of the tensors that need them."""
        saved = ctx.saved_tensors  # Read in any case: torch then sees whether they were written to.
        wrt = tuple(i for i in range(ctx.count) if ctx.needs_input_grad[2 + i])
        given = tuple(i for i in ctx.floating if cotangents[i] is not None)
        values = [cotangents[i] for i in given]
        gradients: list[torch.Tensor | None] = [None] * ctx.count
        if not given:
            return None, None, *gradients
        # Memory goes free as torch's does; another backward computes it anew.
        pull, ctx.pull = ctx.pull, None
        # The residuals are for what the innermost `torch.func.grad` differentiates; what is around
        # it may ask for the gradients of other tensors, of parameters, say.
        if pull is not None and not torch.is_grad_enabled() and set(wrt) <= set(ctx.wrt):
            program = pullback(tuple(map(ctx.floating.index, given)), tuple(map(ctx.wrt.index, wrt)))
            found = apply(program, Frame(bound=pull, wide=ctx.frame.wide), values)
        else:
            found = apply(ctx.program.vjp(wrt, given), ctx.frame.another(), [*saved, *values])
        for i, gradient in zip(wrt, found, strict=True):
            gradients[i] = gradient
        return None, None, *gradients

    @staticmethod
    def jvp(ctx: Any, *tangents: torch.Tensor | None) -> Any:
        """The tangents of the floating results."""
        ctx.pull = None  # Its residuals have no tangents.
        moved = tuple(i for i, x in enumerate(tangents[2:]) if x is not None)
        values = [*ctx.saved_tensors, *(tangents[2 + i] for i in moved)]
        found = apply(ctx.program.jvp(moved), ctx.frame.another(), values)
        results: list[torch.Tensor | None] = [None] * ctx.results
        for i, tangent in zip(ctx.floating, found, strict=True):
            results[i] = tangent
        return tuple(results)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        """The batched program."""
        program, frame, *tensors = args
        inner = frame.another()
        results = apply(program.vmap(tuple(in_dims[2:])), inner, tensors)
        frame.tree = inner.tree
        return results, (0,) * len(results)
