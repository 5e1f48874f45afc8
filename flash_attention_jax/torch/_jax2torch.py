"""`jax2torch`: any JAX function as a PyTorch function."""

from __future__ import annotations

import contextlib
import functools
import sys
import types
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from flash_attention_jax.torch._crossing import x64_is_on
from flash_attention_jax.torch._function import apply
from flash_attention_jax.torch._program import Frame, Program


def jax2torch(f: Callable[..., Any]) -> Callable[..., Any]:
    """A function of arrays as a function of tensors.

    Tensors cross in both directions by DLPack, without a copy, on the CPU and on CUDA, in the order
    of torch's current stream. Only tensors that XLA cannot read in place are copied: those that are
    not contiguous, pinned, or (on the CPU) aligned to less than XLA asks for.

    `f` is compiled once for each structure of the arguments, shapes and dtypes of the tensors and
    values of what is no tensor, and again for each derivative that is asked for. It must be pure,
    as under `jax.jit`. Torch differentiates the result to any order: backward, for the inputs that
    require it alone and from the residuals of the forward pass; forward mode; and `torch.func`'s
    `grad`, `vjp`, `jvp` and `vmap`. Inside of `torch.utils.checkpoint` and other hooks on saved
    tensors the residuals are not kept: the backward pass starts from the inputs. With
    `torch.compile` it is a graph break; `flash_attention_jax.torch.flash_attention` is not.

    A call with a 64-bit tensor runs with `jax_enable_x64`, so that every dtype crosses as it is.

    Args:
        f: a function of any arguments, containers of them (tuples, lists, dicts, NamedTuples, other
            pytrees) and None, that returns a pytree of arrays and numbers, which become tensors.
            Torch's own named results (`torch.return_types`) are no pytrees: make tuples of them.

    Returns:
        The function of tensors in place of arrays. Results have the structure of f's, NamedTuples
        included. Arguments that are no tensors are static, as with `jax.jit(static_argnums=...)`,
        and must be hashable. Without any tensor it runs on torch's default device.

    Raises:
        TypeError: `f` is not callable; in a call, a static argument is not hashable or a
            container of tensors, a result is no array, a tensor is sparse or nested, or a dtype is
            one that the other side lacks.
        ValueError: in a call, the tensors are on several devices.
        RuntimeError: in a call, JAX does not see the device of the tensors, or torch traces it.

    Example:
        >>> attend = jax2torch(flash_attention_jax.flash_attention)
        >>> out, lse = attend(q, k, v, causal=True)
    """
    if not callable(f):
        raise TypeError(f"f must be callable, got {type(f).__name__}")
    return OfTensors(f)


class OfTensors:
    """What `jax2torch` returns: it is copied, pickled and bound to instances as a function is."""

    def __init__(self, f: Callable[..., Any]):
        functools.update_wrapper(self, f)
        self._f = f
        self._programs: dict[Hashable, Program] = {}

    @torch.compiler.disable(reason="JAX flattens the arguments")
    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        leaves, tree = jax.tree.flatten((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        static = tuple(_TENSOR if isinstance(x, torch.Tensor) else _key(x) for x in leaves)
        # Derivatives, which may run in another thread, run under the x64 of this call.
        wide = x64_is_on()
        program = self._programs.get((tree, static, wide))
        if program is None:
            program = self._programs[tree, static, wide] = Program(_of_arrays(self._f, leaves, tree))
        frame = Frame(wide=wide)
        results = apply(program, frame, tensors)
        return jax.tree.unflatten(frame.tree, results)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else types.MethodType(self, instance)

    def __repr__(self) -> str:
        return f"jax2torch({self._f!r})"

    def __reduce__(self) -> Any:
        # As a function is: by the name that it is found under, where that is its own.
        name = getattr(self, "__qualname__", "")  # a `functools.partial` has none
        found: Any = sys.modules.get(self.__module__)
        for part in name.split("."):
            found = getattr(found, part, None)
        return name if found is self else (jax2torch, (self._f,))

    def __copy__(self) -> OfTensors:
        return self

    def __deepcopy__(self, memo: Any) -> OfTensors:
        return self


_TENSOR = object()


def _key(x: Any) -> Hashable:
    """Tells static values apart, also those that are equal: 1, 1.0 and True; 0.0 and -0.0."""
    # They are hashed by identity: a call would get the values that its tensors had in another.
    if isinstance(x, tuple | frozenset) and any(isinstance(item, torch.Tensor) for item in x):
        raise TypeError(f"containers of tensors must be pytrees, got {type(x).__name__}: make a tuple of it")
    try:
        hash(x)
    except TypeError:
        raise TypeError(
            f"arguments must be tensors or hashable values, which are static, got {type(x).__name__}: "
            "make a tensor of it"
        ) from None
    # NumPy's floating scalars have zeros of either sign as well; that of bfloat16 is no `np.inexact`.
    return type(x), repr(x) if isinstance(x, float | complex | np.generic) else x


def _of_arrays(f: Callable[..., Any], leaves: list[Any], tree: Any) -> Callable[..., Any]:
    """f as a function of the arrays alone; keeps no tensor alive."""
    template = [_TENSOR if isinstance(x, torch.Tensor) else x for x in leaves]

    def of_arrays(bound: Any, arrays: list[jax.Array]) -> Any:
        given = iter(arrays)
        args, kwargs = jax.tree.unflatten(tree, [next(given) if x is _TENSOR else x for x in template])
        return jax.tree.map(_array, f(*args, **kwargs))

    return of_arrays


def _array(x: Any) -> jax.Array:
    # JAX would make constants of tensors, which are no arguments, and of what is no pytree.
    if not isinstance(x, torch.Tensor | tuple):
        with contextlib.suppress(TypeError):
            return jnp.asarray(x)
    raise TypeError(f"results must be arrays or numbers, got {type(x).__name__}")
