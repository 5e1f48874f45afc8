"""Attention on sequences that are divided over devices.

`_layout` says which positions a device holds and which of its pieces see which; `_circulation` moves
blocks around the ring; `_ring_sum` is the closed form of every derivative of a ring; `_ring` is ring
attention itself; `_exchange` are the strategies that need no ring; `_choice` chooses between them;
`_call` checks the arguments and divides them.
"""
