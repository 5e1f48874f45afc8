"""Measuring: time, memory and error of our implementations beside what one would use instead.

A `Workload` is one problem, a `Peer` one way to compute it, a `Program` a peer prepared for a
workload and a mode. `measure` checks programs against `verify`, times them with `timing` and returns
`results`, which `report` and `plot` show. Frameworks other than JAX are imported when a peer of
theirs is prepared, not before.
"""
