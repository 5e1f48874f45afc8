"""Fixtures for all tests."""

import dataclasses

import jax
import pytest

from flash_attention_jax import _tiles


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of a few rows and columns, so that small problems take many of them."""
    small = _tiles.Target(pairs=8 * 8 * 2, rows=8, cols=8, least=4, narrow=8 * 8 // 2, alone=0)
    monkeypatch.setattr(_tiles, "_CPU", small)
    monkeypatch.setattr(_tiles, "_CPU_MASKED", small)
    jax.clear_caches()
    yield small
    jax.clear_caches()


@pytest.fixture
def replaced_implementation(monkeypatch):
    """A function that replaces fields of an implementation for the test's duration."""
    from flash_attention_jax._dispatch import IMPLEMENTATIONS

    def replace(name, **fields):
        monkeypatch.setitem(IMPLEMENTATIONS, name, dataclasses.replace(IMPLEMENTATIONS[name], **fields))
        jax.clear_caches()

    yield replace
    jax.clear_caches()
