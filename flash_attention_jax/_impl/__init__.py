"""The implementations. None imports another; `_dispatch` alone knows them all."""
