"""Visibility and the block map against nested Python loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flash_attention_jax import _mask, flash_attention
from flash_attention_jax._arguments import normalize
from flash_attention_jax._mask import Cover, Masks
from flash_attention_jax._problem import Operands, arrange

RNG = np.random.default_rng(0)
B, N, T, S = 2, 2, 23, 31
PROBLEMS = {
    "nothing": {},
    "causal": {"causal": True},
    "causal-offset": {"causal": True, "q_offset": -3},
    "causal-offsets": {"causal": True, "q_offset": np.array([4, -7], np.int32)},
    "window": {"window": (5, 2)},
    "window-left": {"window": (5, None), "q_offset": 2},
    "window-right": {"window": (None, 3), "q_offset": np.array([-2, 9], np.int32)},
    "window-causal": {"window": 6, "causal": True},
    "key-mask": {"key_mask": RNG.random((B, S)) < 0.3},
    "key-mask-shared": {"key_mask": (np.arange(S) < 8).astype(np.int32), "causal": True},
    "mask": {"mask": RNG.random((N, T, S)) < 0.5},
    "segments": {"segment_ids": tuple(np.sort(RNG.integers(0, 5, (B, n)), axis=-1) for n in (T, S))},
    "unsorted": {"segment_ids": tuple(RNG.integers(0, 9, (B, n)) for n in (T, S)), "causal": True},
}


def brute(b, n, i, j, options):
    """The predicate of DESIGN section 2, spelled out for one pair."""
    offset = options.get("q_offset", S - T)
    position = i + (offset if isinstance(offset, int) else int(offset[b]))
    left, right = None, None
    if "window" in options:
        w = options["window"]
        left, right = (w, w) if isinstance(w, int) else w
    seen = not (options.get("causal") and j > position)
    seen = seen and (left is None or j - position >= -left)
    seen = seen and (right is None or j - position <= right)
    if "key_mask" in options:
        seen = seen and bool(np.broadcast_to(options["key_mask"], (B, S))[b, j])
    if "mask" in options:
        seen = seen and bool(np.broadcast_to(options["mask"], (B, N, T, S))[b, n, i, j])
    if "segment_ids" in options:
        of_q, of_kv = options["segment_ids"]
        seen = seen and of_q[b, i] == of_kv[b, j]
    return seen


def on_device(operands):
    return Operands(*(x if x is None or isinstance(x, int) else jnp.asarray(x) for x in operands))


def described(options):
    rest = dict(options)
    q, k = np.zeros((B, N, T, 4), np.float32), np.zeros((B, N, S, 4), np.float32)
    named = {x: rest.pop(x) for x in ("mask", "key_mask", "q_offset") if x in rest}
    problem, operands, _ = normalize(Operands(q, k, k, **named), rest.pop("segment_ids", None), **rest)
    return problem, arrange(problem, on_device(operands))


def every_pair(options):
    pairs = np.ndindex(B, N, T, S)
    return np.array([brute(*pair, options) for pair in pairs]).reshape(B, N, T, S)


@pytest.mark.parametrize("name", PROBLEMS)
def test_visible_equals_nested_loops(name):
    problem, operands = described(PROBLEMS[name])
    rows, cols = jnp.arange(T), jnp.arange(S)
    seen = _mask.visible(problem, Masks.of(problem, operands), rows, cols)
    truth = every_pair(PROBLEMS[name])
    if seen is None:
        assert truth.all()
        return
    assert np.array_equal(np.broadcast_to(seen, (B, N, 1, T, S))[:, :, 0], truth)


@pytest.mark.parametrize("block", [(4, 5), (23, 31), (8, 16), (7, 3)])
@pytest.mark.parametrize("name", PROBLEMS)
def test_block_map_equals_nested_loops(name, block):
    problem, operands = described(PROBLEMS[name])
    rows, cols = block
    cover = np.asarray(_mask.block_map(problem, Masks.of(problem, operands), rows, cols))
    assert cover.shape[1:] == (-(-T // rows), -(-S // cols))
    for at in range(cover.shape[1]):
        one = _mask.block_map(problem, Masks.of(problem, operands), rows, cols, jnp.int32(at))
        assert np.array_equal(one[:, 0], cover[:, at])
    truth = every_pair(PROBLEMS[name])
    exact = name not in ("mask", "unsorted", "segments")
    for b, i, j in np.ndindex(B, *cover.shape[1:]):
        block_truth = truth[b, :, i * rows : (i + 1) * rows, j * cols : (j + 1) * cols]
        said = cover[b if cover.shape[0] > 1 else 0, i, j]
        assert said != Cover.NONE or not block_truth.any()
        assert said != Cover.ALL or block_truth.all()
        if exact and "key_mask" not in PROBLEMS[name]:
            assert (said == Cover.NONE) == (not block_truth.any())
            assert (said == Cover.ALL) == block_truth.all()


def test_block_map_of_sorted_segments_skips_and_spares():
    problem, operands = described(PROBLEMS["segments"])
    cover = np.asarray(_mask.block_map(problem, Masks.of(problem, operands), 4, 4))
    assert (cover == Cover.NONE).mean() > 0.4
    ids = np.repeat(np.arange(2), 16)
    q = np.zeros((32, 4), np.float32)
    problem, operands, _ = normalize(Operands(q, q, q), ids)
    arranged = arrange(problem, on_device(operands))
    cover = np.asarray(_mask.block_map(problem, Masks.of(problem, arranged), 8, 8))[0]
    assert np.array_equal(cover == Cover.ALL, np.kron(np.eye(2), np.ones((2, 2))))


@pytest.mark.parametrize("name", PROBLEMS)
def test_visible_pairs_counts(name):
    problem, operands = described(PROBLEMS[name])
    assert _mask.visible_pairs(problem, operands) == every_pair(PROBLEMS[name]).sum()


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize(
    "dtypes", [("uint8", "uint8"), ("uint32", "uint32"), ("uint32", "int32"), ("int8", "int16")]
)
def test_segment_ids_of_every_integer(implementation, dtypes):
    x = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    ids = [0, 0, 1, 1, 2]
    found = flash_attention(
        x, x, x, segment_ids=tuple(np.array(ids, d) for d in dtypes), implementation=implementation
    )
    expected = flash_attention(x, x, x, segment_ids=np.array(ids), implementation=implementation)
    np.testing.assert_array_equal(found.out, expected.out)


OPTIONS = {
    "causal": {"causal": True},
    "offsets": {"causal": True, "q_offset": np.array([0, 1])},
    "key_mask": {"key_mask": np.ones((2, 5), bool)},
    "segment_ids": {"segment_ids": np.zeros((2, 5), np.int32)},
    "mask": {"mask": np.ones((5, 5), bool)},
    "bias": {"bias": np.ones((5, 5), np.float32)},
    "scale": {"scale": jnp.float32(0.3)},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_strict_promotion(name):
    x = jnp.ones((2, 2, 5, 4))
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        gradient = jax.grad(lambda q: flash_attention(q, x, x, **OPTIONS[name]).out.sum())(x)
    assert gradient.shape == x.shape
