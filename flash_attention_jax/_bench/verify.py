"""Is a result right? Judged before it is timed, by the error budget of `testing`, on exact rows.

The oracle is the dense formula in float64, differentiated by JAX, for some queries and all keys: all
queries where the problem is small, else a random few, the first and the last among them. The
cotangent of `out` is 0 for the queries that are not judged, so that every gradient is exact at that
cost as well: those of k and v are sums over the judged queries alone, and that of every other query
must be 0.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from flash_attention_jax._api import attention_and_lse
from flash_attention_jax._bench.modes import MODES, transformed
from flash_attention_jax._bench.workload import Inputs, Workload
from flash_attention_jax.testing import Verdict, error

# The most logits that the oracle holds: 64 MiB in float64, of which a gradient takes a handful.
_LOGITS = 2**23
_FEWEST_ROWS = 8
# A few rows say little about the rounding of a formula: then further inputs are drawn.
_FEW_LOGITS = 2**16
_DRAWS = 8
# Beyond this many budgets a result is another function's. Kernels of others may round the weights to
# half precision before the second product, which the plain formula does not.
_ALLOWANCE = 4.0


@dataclasses.dataclass(frozen=True)
class Truth:
    """What a mode must give on a workload.

    Attributes:
        rows: the queries that are judged, all of which see a key.
        live: which queries see a key, bool (T,).
        dout: the cotangent of `out` to call with, 0 elsewhere, or None where the mode has none.
        exact: results by name; `out`, `tangent` and `dq` of the judged rows.
        budgets: by how much each may err.
    """

    rows: np.ndarray
    live: np.ndarray
    dout: np.ndarray | None
    exact: dict[str, np.ndarray]
    budgets: dict[str, float]

    def judge(self, results: dict[str, np.ndarray]) -> tuple[Verdict, ...]:
        """Compares the results of a program that was called with `dout`."""
        return tuple(
            Verdict(name, self._error(name, results[name]), self.budgets[name]) for name in self.exact
        )

    def _error(self, name: str, actual: np.ndarray) -> float:
        if name in ("dk", "dv"):
            return error(actual.astype(np.float64), self.exact[name])
        if actual.ndim != 4 or actual.shape[2] != self.live.size:
            return math.inf
        found = error(actual[:, :, self.rows].astype(np.float64), self.exact[name])
        if name == "dq":
            others = self.live.copy()
            others[self.rows] = False
            rest = actual[:, :, others].astype(np.float32)
            found = max(found, error(rest, np.zeros_like(rest)))
        return found


def budgets_allowed(workload: Workload, ours: bool) -> float:
    """How many error budgets a result may take and still be timed.

    Ours must keep within one, but for float64: there the oracle errs as much as what it judges.
    """
    return 1.0 if ours and workload.dtype != "float64" else _ALLOWANCE


def truth(workload: Workload, mode: str, inputs: Inputs) -> Truth:
    """The oracle's results for a workload, and the error budget of each.

    Raises:
        ValueError: no query sees a key, so that there is nothing to judge.
    """
    live = living(inputs)
    rows = _rows(workload, live)
    dout = _masked_cotangent(inputs, rows) if mode == "forward+backward" else None
    exact = _evaluate(inputs, mode, rows, "float64")
    plain = _plain_errors(inputs, mode, rows, exact)
    eps = float(jnp.finfo(workload.dtype).eps)
    budgets = {name: 2 * plain[name] + eps * float(np.abs(x).max()) for name, x in exact.items()}
    for name, other in (("dq", "k"), ("dk", "q")):
        # Where each query sees one key, the plain formula subtracts equal numbers and errs by nothing.
        if budgets.get(name) == 0 and dout is not None:
            budgets[name] = eps * _largest_term(inputs, dout, other)
    return Truth(rows, live, dout, exact, budgets)


def _largest_term(inputs: Inputs, dout: np.ndarray, other: str) -> float:
    """A bound of the terms that cancel in a gradient of q or k: dout·v times the other of them."""
    longest = (np.linalg.norm(x, axis=-1).max() for x in (dout, inputs.normal("v")))
    size = math.prod(map(float, longest)) * float(np.abs(inputs.normal(other)).max())
    return size * inputs.workload.head_dim**-0.5


def living(inputs: Inputs) -> np.ndarray:
    """Which queries see a key in every batch element, bool (T,); functions differ about the others.

    Raises:
        ValueError: none does, so that there is nothing to measure.
    """
    w = inputs.workload
    live = np.ones(w.length, bool)
    if w.kv_length is None and w.key_mask is None:
        return live  # Each sees the key at its own place.
    for start in range(0, w.length, 1024):
        seen = inputs.visible(np.arange(start, min(start + 1024, w.length)))
        if seen is not None:
            live[start : start + 1024] = np.all(np.any(seen, axis=-1), axis=(0, 1))
    if not live.any():
        raise ValueError(f"no query of {w.label} sees a key, so that there is nothing to measure")
    return live


def _rows(w: Workload, live: np.ndarray) -> np.ndarray:
    alive = np.flatnonzero(live)
    count = max(_FEWEST_ROWS, _LOGITS // (w.batch * w.N * w.S))
    if count >= alive.size:
        return alive
    ends = alive[[0, -1]]
    others = np.random.default_rng(0).choice(alive[1:-1], count - 2, replace=False)
    return np.sort(np.concatenate([ends, others]))


def _masked_cotangent(inputs: Inputs, rows: np.ndarray) -> np.ndarray:
    dout = inputs.normal("dout")
    result = np.zeros_like(dout)
    result[:, :, rows] = dout[:, :, rows]
    return result


def _evaluate(inputs: Inputs, mode: str, rows: np.ndarray, dtype: str) -> dict[str, np.ndarray]:
    """The plain formula of some rows in a dtype, in float64 arrays; float64 itself on the CPU."""
    wide = dtype == "float64"
    device = jax.local_devices(backend="cpu")[0] if wide else jax.local_devices()[0]
    with jax.enable_x64(wide), jax.default_device(device):

        def array(name):
            x = inputs.normal(name)
            return jnp.asarray(x if name[0] in "kv" else x[:, :, rows], dtype)

        bias = inputs.bias
        if bias is not None:
            bias = jnp.asarray(bias if bias.shape[2] == 1 else bias[:, :, rows], dtype)
        seen = inputs.visible(rows)
        masks = {"mask": None if seen is None else jnp.asarray(seen), "bias": bias}
        precision = None if wide else inputs.workload.precision
        qkv, more = (tuple(map(array, names)) for names in (("q", "k", "v"), MODES[mode].extras))

        outputs = _plain(qkv, more, masks, mode, precision)
        return {n: np.asarray(x, np.float64) for n, x in zip(MODES[mode].outputs, outputs, strict=True)}


@functools.partial(jax.jit, static_argnums=(3, 4))
def _plain(qkv, more, masks, mode: str, precision: str | None):
    def formula(q, k, v):
        return attention_and_lse(q, k, v, **masks, precision=precision).out

    return transformed(formula, mode)(qkv, more)


def _plain_errors(
    inputs: Inputs, mode: str, rows: np.ndarray, exact: dict[str, np.ndarray]
) -> dict[str, float]:
    """err(plain, exact) in the workload's dtype, as `testing.plain_errors` defines it."""
    w = inputs.workload
    if w.dtype == "float64":
        single = Inputs(dataclasses.replace(w, dtype="float32"))
        narrow = _plain_errors(single, mode, rows, _evaluate(single, mode, rows, "float64"))
        ratio = float(np.finfo(np.float64).eps / np.finfo(np.float32).eps)
        return {name: x * ratio for name, x in narrow.items()}
    errors = dict.fromkeys(exact, 0.0)
    draws = _DRAWS if w.batch * w.N * rows.size * w.S <= _FEW_LOGITS else 1
    for draw in range(draws):
        drawn = inputs if draw == 0 else Inputs(w, draw)
        right = exact if draw == 0 else _evaluate(drawn, mode, rows, "float64")
        plain = _evaluate(drawn, mode, rows, w.dtype)
        found = {name: error(plain[name], x) for name, x in right.items()}
        errors = {
            name: max(errors[name], x) if math.isfinite(x) else errors[name] for name, x in found.items()
        }
    return errors
