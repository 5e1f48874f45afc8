"""docs/migrating.md: its code runs, and its tables name arguments that there are."""

import inspect
import itertools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flash_attention_jax

PAGE = (pathlib.Path(__file__).parent.parent / "docs" / "migrating.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.S | re.M))


def run(section):
    """The blocks of a section, one after another."""
    names = {}
    for block in re.findall(r"```python\n(.*?)```", SECTIONS[section], re.S):
        for module in ("torch", "flax", "equinox", "haiku"):
            if re.search(rf"^(import|from) {module}\b", block, re.M):
                pytest.importorskip(
                    module, reason=f"{module} is not installed: its part of the page is not run"
                )
        exec(compile(block, "docs/migrating.md", "exec"), names)
    return names


@pytest.mark.parametrize("section", SECTIONS)
def test_code_runs(section):
    assert run(section)["out"].ndim


@pytest.mark.parametrize("heads", [(), (4,)])
def test_the_layer_of_equinox_computes_what_equinoxs_does(heads):
    names = run("Equinox")
    x, random = names["x"], jax.random.bernoulli(jax.random.key(2), shape=(*heads, 50, 50))
    mask = random | jnp.eye(50, dtype=bool)
    theirs = names["equinox"].nn.MultiheadAttention(4, 32, key=jax.random.key(0))
    np.testing.assert_allclose(names["layer"](x, x, x, mask), theirs(x, x, x, mask), atol=2e-6)
    causal = jnp.tril(jnp.ones((50, 50), bool))
    np.testing.assert_allclose(names["out"], theirs(x, x, x, causal), atol=2e-6)


def test_the_layer_of_haiku_computes_what_haikus_does():
    names = run("Haiku")
    haiku, x = names["haiku"], names["x"]

    def layer(x):
        options = {"w_init": haiku.initializers.VarianceScaling(), "name": "flash_multi_head_attention"}
        causal = jnp.tril(jnp.ones((1, 1, 50, 50), bool))
        return haiku.MultiHeadAttention(4, 8, **options)(x, x, x, causal)

    theirs = haiku.transform(layer)
    parameters = [f.init(jax.random.key(1), x) for f in (names["transformed"], theirs)]
    jax.tree.map(np.testing.assert_array_equal, *parameters)
    np.testing.assert_allclose(names["out"], theirs.apply(parameters[1], None, x), atol=2e-6)


def test_packed_sequences_are_attended_to_one_by_one():
    names = run("flash_attn")
    x, bounds = names["x"], [0, 30, 75, 100]
    packed = flash_attention_jax.flash_attention(x, x, x, segment_ids=names["ids"], causal=True).out
    parts = [x[:, a:b] for a, b in itertools.pairwise(bounds)]
    alone = [flash_attention_jax.flash_attention(p, p, p, causal=True).out for p in parts]
    np.testing.assert_allclose(packed, np.concatenate(alone, 1), atol=1e-6)


def test_links_lead_to_sections():
    links = re.findall(r"\]\(#(.*?)\)", PAGE)
    anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in SECTIONS]
    assert links == anchors


def test_the_table_of_jax_nn_names_all_of_its_arguments():
    from jax.nn import dot_product_attention as theirs

    rows = SECTIONS["`jax.nn.dot_product_attention`"]
    names = set(inspect.signature(theirs).parameters) - {"query", "key", "value"}
    ours = set(inspect.signature(flash_attention_jax.dot_product_attention).parameters)
    assert all(f"`{name}" in rows for name in names & ours)


@pytest.mark.parametrize("section", ["flash-attention-jax 0.3.1"])
def test_names_of_the_older_package_are_here(section):
    first = [row.split("|")[1] for row in SECTIONS[section].splitlines() if row.startswith("| `")]
    names = [name for cell in first for name in re.findall(r"`([a-z_]+)[(`]", cell)]
    assert len(names) == 9
    assert all(hasattr(flash_attention_jax, name) for name in names)


# What flash-attention-jax 0.3.1 exports, and the arguments there that are not here.
OLDER = {
    "flash_attention": (),
    "causal_flash_attention": (),
    "cosine_sim_flash_attention": (),
    "rabe_attention": ("q_chunk_size=1024", "k_chunk_size=4096"),
    "value_and_grad_difference": ("batch=2", "heads=4", "q_seq_len=4096", "add_key_mask=True"),
    "attention": (),
    "plain_attention": (),
    "causal_attention": (),
    "cosine_sim_attention": (),
    "PRNGKeyGenerator": (),
}
ROWS = [row.split("|")[1:3] for row in SECTIONS["flash-attention-jax 0.3.1"].splitlines() if row[:3] == "| `"]


@pytest.mark.parametrize("name", OLDER)
def test_the_table_of_the_older_package_says_what_is_called_differently(name):
    ((there, here),) = (row for row in ROWS if re.search(f"`{name}[(`]", row[0]))
    assert all(argument in there for argument in OLDER[name])
    function = getattr(flash_attention_jax, name, None)
    if function is None:
        assert here.strip().startswith("gone")
        return
    parameters = inspect.signature(function).parameters
    ours = [key if p.default is p.empty else f"{key}={p.default}" for key, p in parameters.items()]
    assert not set(OLDER[name]) & set(ours)
    if OLDER[name]:
        assert f"`{name}({', '.join(ours)})`" in here
    if "flash" in name:
        assert f"`{name}(" in here
        assert ".out`" in here
