"""Which device holds which positions, and what is in reach at each hop, against nested loops."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from flash_attention_jax import Unsupported
from flash_attention_jax._distributed._call import Options, describe
from flash_attention_jax._distributed._layout import from_natural, to_natural, ways
from flash_attention_jax._mask import Cover
from flash_attention_jax._problem import Operands
from flash_attention_jax.distributed import explain, ring_attention, shard_sequence, unshard_sequence


def plan_of(devices=4, layout="contiguous", T=6, S=6, N=1, K=1, D=8, implementation=None, **options):
    q, k = (jax.ShapeDtypeStruct((h, n, D), "float32") for h, n in ((N, T), (K, S)))
    offset = options.pop("q_offset", None)
    chosen = Options(layout=layout, implementation=implementation, **options)
    return describe(chosen, devices, Operands(q, k, k, q_offset=offset), None, None, abstract=True)[:2]


def held(layout, devices, length):
    """The positions of each device, written out."""
    if layout == "contiguous":
        return [list(range(r * length, (r + 1) * length)) for r in range(devices)]
    half = length // 2
    ends = [(r, 2 * devices - 1 - r) for r in range(devices)]
    return [[p * half + i for p in pair for i in range(half)] for pair in ends]


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_order(layout, axis):
    shape = [2, 3, 5]
    shape[axis] = 24
    x = jnp.moveaxis(jnp.broadcast_to(jnp.arange(24), (*np.delete(shape, axis), 24)), -1, axis)
    stored = from_natural(x, axis, layout, 4)
    expected = np.concatenate(held(layout, 4, 6))
    np.testing.assert_array_equal(np.moveaxis(stored, axis, -1)[0, 0], expected)
    np.testing.assert_array_equal(to_natural(stored, axis, layout, 4), x)


BANDS = (
    dict(causal=True),
    dict(window=3),
    dict(window=(7, None)),
    dict(window=(4, 0), q_offset=5),
    dict(causal=True, q_offset=-9),
    dict(causal=True, T=4, S=8),
    dict(window=0, q_offset=300),
)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("band", BANDS, ids=str)
def test_reach(layout, band):
    plan, whole = plan_of(layout=layout, **band)
    rows, cols = (held(layout, 4, n) for n in (plan.problem.T, plan.problem.S))
    offset = band.get("q_offset", whole.S - whole.T)
    left, right = band.get("window") if isinstance(band.get("window"), tuple) else [band.get("window")] * 2
    right = 0 if band.get("causal") else right

    def seen(i, j):
        distance = j - (i + offset)
        return (left is None or distance >= -left) and (right is None or distance <= right)

    needed = {0}
    for i, j in [(i, j) for i in range(plan.pieces) for j in range(plan.pieces)]:
        for hop in range(4):
            kinds, index = ways(plan, (i, j), (hop,))
            for device in range(4):
                t, s = plan.lengths
                here = rows[device][i * t : (i + 1) * t]
                there = cols[(device - hop) % 4][j * s : (j + 1) * s]
                pairs = [seen(a, b) for a in here for b in there]
                way = kinds[index[device, hop]]
                expected = Cover.ALL if all(pairs) else Cover.PART if any(pairs) else Cover.NONE
                assert way.cover == expected
                if way.offset is not None:
                    assert way.offset == offset + here[0] - there[0]
                if any(pairs):
                    needed.add(hop)
    assert plan.hops == tuple(sorted(needed))


def test_zigzag_gives_every_device_the_same_work():
    for layout, equal in (("zigzag", True), ("contiguous", False)):
        plan, _ = plan_of(devices=8, layout=layout, T=8, S=8, causal=True)
        pairs = [(i, j) for i in range(plan.pieces) for j in range(plan.pieces)]
        work = sum(plan.covers(pair)[0].astype(int) for pair in pairs)
        assert (work == work[0]).all() == equal


def test_a_window_leaves_out_hops():
    assert plan_of(devices=8, T=16, S=16, causal=True, window=(20, 0))[0].hops == (0, 1, 2)
    assert plan_of(devices=8, T=16, S=16, window=(5, 5))[0].hops == (0, 1, 7)
    assert plan_of(devices=8, T=16, S=16)[0].hops == tuple(range(8))


def test_choice():
    x = jax.ShapeDtypeStruct((16, 32768, 128), "bfloat16")
    found = explain(x, x, x, causal=True, devices=4)
    assert found.chosen == "ring"
    assert "3 of 3 hops" in found.reasons["ring"]
    small = jax.ShapeDtypeStruct((16, 16, 128), "bfloat16")
    assert explain(small, small, small, devices=4).chosen == "all_gather"
    short = jax.ShapeDtypeStruct((64, 1024, 128), "bfloat16")
    assert explain(short, short, short, devices=4).chosen == "all_to_all"
    odd = jax.ShapeDtypeStruct((15, 2048, 512), "bfloat16")
    found = explain(odd, odd, odd, devices=4)
    assert found.chosen == "ring"
    assert "N = 15" in found.reasons["all_to_all"]
    assert "no key on another device" in str(explain(x, x, x, devices=4, window=(0, 0)))
    assert "chosen: " in str(found)
    assert "T=8192" in str(found)
    assert explain(odd, odd, odd, devices=4, implementation="reference").chosen == "all_gather"


X = np.zeros((2, 8, 4), np.float32)
MESH = {"mesh": jax.sharding.AbstractMesh((1,), ("x",))}
PAIR = {"mesh": jax.sharding.AbstractMesh((2, 1), ("d", "x"))}
WRONG = {
    "no axis": (dict(), ValueError, "axis_name must be an axis of a jax.shard_map around, or mesh be given"),
    "axis": (
        dict(MESH, axis_name="y"),
        ValueError,
        r"axis_name must be of the mesh's axes \('x',\), got 'y'",
    ),
    "axis type": (dict(MESH, axis_name=("x",)), TypeError, "axis_name must be the name of a mesh axis"),
    "mesh": (dict(mesh=3), TypeError, "mesh must be None or a jax.sharding.Mesh, got int"),
    "strategy": (
        dict(MESH, strategy="rings"),
        ValueError,
        "strategy must be None, 'ring' or 'all_to_all' or 'all_gather', got 'rings'",
    ),
    "layout": (dict(MESH, layout=None), TypeError, "layout must be 'contiguous' or 'zigzag', got None"),
    "spec": (dict(MESH, spec=3), TypeError, "spec must be None or a jax.sharding.PartitionSpec, got int"),
    "spec axes": (
        dict(MESH, spec=P("x")),
        ValueError,
        "spec must be of 3 axes, the length over 'x' and the head dim whole",
    ),
    "spec entries": (
        dict(MESH, spec=P(P.UNCONSTRAINED, "x", None)),
        ValueError,
        "spec must be of None, names of mesh axes, and tuples of names, got P",
    ),
    "spec names": (
        dict(MESH, spec=P("nope", "x", None)),
        ValueError,
        r"spec must be of the mesh's axes \('x',\), got P.*'nope', 'x', None",
    ),
    "spec twice": (
        dict(PAIR, q=np.zeros((2, 2, 8, 4), np.float32), spec=P("d", "d", "x", None)),
        ValueError,
        "spec must be with each mesh axis once, got P",
    ),
    "spec batch": (
        dict(PAIR, q=np.zeros((3, 2, 8, 4), np.float32), spec=P("d", None, "x", None)),
        ValueError,
        r"spec must be of mesh axes that divide the batch shape \(3,\), got P",
    ),
    "spec heads": (
        dict(PAIR, q=np.zeros((2, 3, 8, 4), np.float32), spec=P(None, "d", "x", None)),
        ValueError,
        "spec must be of mesh axes that divide the head counts N = 3 and K = 3, got P",
    ),
    "spec without mesh": (
        dict(spec=P()),
        ValueError,
        "spec must be None without mesh",
    ),
    "implementation": (dict(MESH, implementation="y"), ValueError, "implementation must be None or one of"),
    "offset": (dict(MESH, q_offset=1), ValueError, "q_offset must be None without causal or window"),
    "odd": (
        dict(MESH, layout="zigzag", q=X[:, :7]),
        ValueError,
        "q must be of a length that 2 divides, in the zig-zag layout, got 7",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors(name):
    options, error, message = WRONG[name]
    options = dict(options)
    q = options.pop("q", X)
    k = X if q.ndim == X.ndim else q
    with pytest.raises(error, match=message):
        ring_attention(q, k, k, **options)


WRONG_SHARDS = {
    "mesh": (dict(mesh=None), TypeError, "mesh must be a jax.sharding.Mesh, got NoneType"),
    "axis": (dict(axis="a"), TypeError, "axis must be an int, got 'a'"),
    "axis of bool": (dict(axis=True), TypeError, "axis must be an int, got True"),
    "no such axis": (dict(axis=3), ValueError, "axis must be an axis of x, which has 3, got 3"),
    "mesh axis": (dict(axis_name="y"), ValueError, r"axis_name must be of the mesh's axes \('x',\), got 'y'"),
    "x": (dict(x=[1, 2]), TypeError, "x must be a JAX or NumPy array, got list"),
}


@pytest.mark.parametrize("function", [shard_sequence, unshard_sequence])
@pytest.mark.parametrize("name", WRONG_SHARDS)
def test_errors_of_shards(function, name):
    options, error, message = WRONG_SHARDS[name]
    options = MESH | options
    with pytest.raises(error, match=message):
        function(options.pop("x", X), **options)


@pytest.mark.parametrize(
    ("devices", "error"), [(True, TypeError), (2.0, TypeError), (None, TypeError), (0, ValueError)]
)
def test_a_number_of_devices(devices, error):
    with pytest.raises(error, match=f"devices must be a positive int, got {devices}"):
        explain(X, X, X, devices=devices)


def test_refusals_by_name():
    from flash_attention_jax._distributed import _choice

    plan, whole = plan_of(N=4, K=2)
    with pytest.raises(ValueError, match="the head count K = 2 of k and v is not divided by 4 devices"):
        _choice.chosen("all_to_all", whole, plan)
    with pytest.raises(ValueError, match="the head count N = 4 of q"):
        _choice.chosen("all_to_all", whole, dataclasses.replace(plan, devices=3))
    plan, whole = plan_of(implementation="reference")
    with pytest.raises(Unsupported, match="'reference' cannot run in a ring"):
        _choice.chosen("ring", whole, plan)
    x, bias = (jax.ShapeDtypeStruct(s, "float32") for s in ((1, 6, 8), (6, 7)))
    with pytest.raises(ValueError, match="bias must be of the whole sequence's S = 24"):
        explain(x, x, x, bias=bias, devices=4)


def test_a_bias_of_single_queries_is_ambiguous():
    x, bias = (jax.ShapeDtypeStruct(s, "float32") for s in ((1, 1, 8), (1, 1)))
    with pytest.raises(ValueError, match="bias must be None where a device holds a single query or key"):
        explain(x, x, x, bias=bias, devices=4)
