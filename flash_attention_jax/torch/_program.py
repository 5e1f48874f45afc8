"""JAX functions of lists of arrays, compiled once per signature, and what is derived from them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import torch

from flash_attention_jax.torch._crossing import (
    common_device,
    is_wide,
    jax_device,
    on_device,
    refuse_tracing,
    to_jax,
    to_torch,
    x64_is_on,
)

Indices = tuple[int, ...]
# (bound, arrays) -> a pytree of arrays.
Function = Callable[[Any, list[Any]], Any]


@dataclasses.dataclass
class Frame:
    """What goes along with one call of a program besides its tensors.

    Attributes:
        bound: a pytree of JAX arrays that the program reads, which nothing differentiates.
        wide: whether to run with `jax_enable_x64`; 64-bit tensors switch it on as well.
        wrt: tensors whose gradients will be asked for; where there are any, `pull` is set.
        tree: set by the call, the structure of its results.
        pull: set by the call, the residuals of its vjp.
    """

    bound: Any = None
    wide: bool = False
    wrt: Indices = ()
    tree: Any = None
    pull: Any = None

    def another(self) -> Frame:
        """A frame for a program that is derived from the one called with this."""
        return Frame(bound=self.bound, wide=self.wide)


class Program:
    """A function `(bound, arrays) -> pytree`, called with tensors in place of arrays.

    `vjp`, `jvp` and `vmap` give programs, made and compiled once, so that derivatives of every
    order and batches of them are programs again.
    """

    # Whether `vjp` and `jvp` take the results as well, between the tensors and what is linear.
    reads_results = False

    def __init__(self, function: Function):
        self.function = function
        self._derived: dict[Any, Any] = {}
        self._call = jax.jit(function)
        self._linearized: dict[Indices, Any] = {}

    def run(self, frame: Frame, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Calls the function: the leaves of its result, whose structure is put into the frame.

        Raises:
            ValueError: the tensors are on several devices.
            RuntimeError: JAX does not see their device.
        """
        if torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() is not None:
            refuse_tracing()
        device = common_device(tensors)
        target = jax_device(device)
        frame.wide = frame.wide or is_wide(tensors)
        with on_device(device), jax.enable_x64(frame.wide or x64_is_on()):
            arrays = [to_jax(x) for x in tensors]
            if frame.wrt:
                result, residuals = self._linearize(frame.wrt)(frame.bound, arrays)
                frame.pull = residuals.filled(arrays)
            elif arrays:
                result = self._call(frame.bound, arrays)
            else:
                with jax.default_device(target):
                    result = self._call(frame.bound, arrays)
            leaves, frame.tree = jax.tree.flatten(result)
            return tuple(to_torch(x) for x in leaves)

    def vjp(self, wrt: Indices, given: Indices) -> Program:
        """(tensors, cotangents of the results `given`) -> gradients of the tensors `wrt`."""
        return self._derive(vjp_of, wrt, given)

    def jvp(self, moved: Indices) -> Program:
        """(tensors, tangents of the tensors `moved`) -> tangents of the floating results."""
        return self._derive(jvp_of, moved)

    def vmap(self, dims: tuple[int | None, ...]) -> Program:
        """The program of tensors that have a new axis at these places, which results have first."""
        return self._derive(vmap_of, dims)

    def _derive(self, derivation: Callable[..., Function], *parameters: Any) -> Program:
        key = (derivation, *parameters)
        if key not in self._derived:
            self._derived[key] = Program(derivation(self.function, *parameters))
        return self._derived[key]

    def _linearize(self, wrt: Indices) -> Callable[..., Any]:
        if wrt not in self._linearized:
            self._linearized[wrt] = jax.jit(_linearized(self.function, wrt))
        return self._linearized[wrt]


def _floating(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _conjugate(x: Any) -> Any:
    """JAX's cotangents of complex values are the conjugates of torch's."""
    return jnp.conj(x) if jnp.iscomplexobj(x) else x


def _of_moved(function: Function, bound: Any, arrays: Sequence[Any], wrt: Indices) -> Callable[..., Any]:
    """The function of the arrays `wrt` alone."""

    def of_moved(moved):
        full = list(arrays)
        for i, x in zip(wrt, moved, strict=True):
            full[i] = x
        return function(bound, full)

    return of_moved


def vjp_of(function: Function, wrt: Indices, given: Indices) -> Function:
    """What `Program.vjp` calls."""

    def derived(bound, values):
        count = len(values) - len(given)
        arrays, cotangents = values[:count], values[count:]
        whole = _of_moved(function, bound, arrays, wrt)

        def of_moved(moved):
            leaves = jax.tree.leaves(whole(moved))
            return [leaves[i] for i in given]

        _, pull = jax.vjp(of_moved, [arrays[i] for i in wrt])
        (gradients,) = pull([_conjugate(x) for x in cotangents])
        return [_conjugate(x) for x in gradients]

    return derived


def jvp_of(function: Function, moved: Indices) -> Function:
    """What `Program.jvp` calls."""

    def derived(bound, values):
        count = len(values) - len(moved)
        arrays, tangents = values[:count], values[count:]
        whole = _of_moved(function, bound, arrays, moved)

        def of_moved(x):
            return [leaf for leaf in jax.tree.leaves(whole(x)) if _floating(leaf)]

        return jax.jvp(of_moved, ([arrays[i] for i in moved],), (tangents,))[1]

    return derived


def vmap_of(function: Function, dims: tuple[int | None, ...]) -> Function:
    """What `Program.vmap` calls."""
    return jax.vmap(function, in_axes=(None, list(dims)))


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Residuals:
    """What a vjp keeps from its forward pass, arguments of the forward pass left out.

    Attributes:
        arrays: those that it computed.
        arguments: those of its arguments that it keeps, put back by `filled`.
        sources: for each residual in order, the argument that it is, or None.
        tree: of the vjp function whose leaves they are.
        results: shape and dtype of each floating result.
    """

    arrays: tuple[Any, ...]
    arguments: tuple[Any, ...]
    sources: tuple[int | None, ...]
    tree: Any
    results: tuple[tuple[tuple[int, ...], Any], ...]

    @classmethod
    def of(cls, pull: Any, arguments: Sequence[Any], results: Sequence[Any]) -> Residuals:
        """Of a vjp function, while it is traced."""
        leaves, tree = jax.tree.flatten(pull)
        places = {id(x): i for i, x in reversed(list(enumerate(arguments)))}
        sources = tuple(places.get(id(x)) for x in leaves)
        arrays = tuple(x for x, source in zip(leaves, sources, strict=True) if source is None)
        return cls(arrays, (), sources, tree, tuple((x.shape, x.dtype) for x in results))

    def filled(self, arguments: Sequence[Any]) -> Residuals:
        """With the arguments that a compiled forward pass did not have to copy."""
        kept = tuple(arguments[i] for i in self.sources if i is not None)
        return dataclasses.replace(self, arguments=kept)

    def pull(self) -> Any:
        """The vjp function."""
        arrays, arguments = iter(self.arrays), iter(self.arguments)
        leaves = [next(arrays if source is None else arguments) for source in self.sources]
        return jax.tree.unflatten(self.tree, leaves)

    def tree_flatten(self):
        """The arrays, and all that is static."""
        return (self.arrays, self.arguments), (self.sources, self.tree, self.results)

    @classmethod
    def tree_unflatten(cls, static, arrays):
        """Inverse of `tree_flatten`."""
        return cls(*arrays, *static)


def _linearized(function: Function, wrt: Indices) -> Callable[..., Any]:
    """(bound, arrays) -> the result of the function and the residuals of its vjp."""

    def forward(bound, arrays):
        whole = _of_moved(function, bound, arrays, wrt)

        def of_moved(moved):
            result = whole(moved)
            return [x for x in jax.tree.leaves(result) if _floating(x)], result

        floating, pull, result = jax.vjp(of_moved, [arrays[i] for i in wrt], has_aux=True)
        return result, Residuals.of(pull, arrays, floating)

    return forward


@functools.cache
def pullback(given: Indices, wanted: Indices) -> Program:
    """Cotangents of some floating results -> some of the gradients, with bound `Residuals`.

    Args:
        given: which of the floating results have a cotangent, the others' being 0.
        wanted: which of the gradients that the residuals are for.
    """

    def function(residuals: Residuals, cotangents):
        full = [jnp.zeros(shape, dtype) for shape, dtype in residuals.results]
        for i, x in zip(given, cotangents, strict=True):
            full[i] = _conjugate(x)
        (gradients,) = residuals.pull()(full)
        return [_conjugate(gradients[i]) for i in wanted]

    return Program(function)
