"""A report as a picture: time against length and memory against length, the peers as lines."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from flash_attention_jax._bench.machine import installed, load
from flash_attention_jax._bench.report import heading
from flash_attention_jax._bench.results import Cell, Report, Row
from flash_attention_jax._bench.workload import Workload

# The most groups of problems, each with two panels, that one picture still shows.
_MOST_GROUPS = 6
_ENDINGS = (".png", ".svg", ".pdf")
_MARKERS = "osD^vPX*<>hd"
# What none of the linear ones stores, for comparison.
_MATRIX = {
    "color": "grey",
    "linestyle": ":",
    "linewidth": 1.5,
    "label": "the T x S matrix of all heads",
    "zorder": 1,
}
_MODES = {"forward": "forward", "forward+backward": "forward and gradients", "jvp": "jvp"}


@dataclasses.dataclass(frozen=True)
class Group:
    """Rows that differ in length alone, shortest first."""

    rows: tuple[Row, ...]

    @property
    def title(self) -> str:
        """What the rows have in common."""
        row = self.rows[0]
        w = row.workload
        if w.heads is None:
            shape = f"no heads, head dim {w.head_dim}"
        else:
            shape = f"{w.heads} heads of {w.head_dim}"
            shape += f", {w.K} key/value heads" * (w.heads != w.K)
        batches = {r.workload.batch for r in self.rows}
        tokens = {r.workload.batch * r.workload.length for r in self.rows}
        if len(batches) == 1:
            shape = f"batch {w.batch}, {shape}" if w.heads is not None else shape
        elif len(tokens) == 1:
            shape = f"{tokens.pop()} tokens, {shape}"
        return ", ".join([_MODES[row.mode], shape, w.dtype, *w.options])


def groups(rows: Sequence[Row]) -> list[Group]:
    """Rows put together that differ in length (and in batch, where the tokens stay the same)."""
    kinds = {_kind(row.workload, row.mode): None for row in rows}
    result = []
    for kind in kinds:
        alike = [row for row in rows if _kind(row.workload, row.mode) == kind]
        alike.sort(key=lambda row: row.workload.length)
        tokens = {row.workload.batch * row.workload.length for row in alike}
        parts = [alike]
        if len(tokens) > 1:
            batches = dict.fromkeys(row.workload.batch for row in alike)
            parts = [[row for row in alike if row.workload.batch == batch] for batch in batches]
        result += [Group(tuple(part)) for part in parts]
    return result


def _kind(w: Workload, mode: str) -> tuple[Any, ...]:
    """All of a workload but its length and batch."""
    fields = (f.name for f in dataclasses.fields(w) if f.name not in ("length", "batch"))
    return mode, *(getattr(w, name) for name in fields)


def check(path: str, rows: Sequence[Row]) -> None:
    """Whether `draw` will be able to, once these rows are measured.

    Raises:
        ValueError: matplotlib is missing, the path's ending names no format, or there are too many
            kinds of problems for one picture.
    """
    if not installed("matplotlib"):
        raise ValueError("plot needs matplotlib: pip install 'flash_attention_jax[cli]'")
    if not path.endswith(_ENDINGS):
        raise ValueError(f"plot must end in {', '.join(_ENDINGS)}, got {path!r}")
    count = len(groups(rows))
    if count > _MOST_GROUPS:
        raise ValueError(
            f"plot must be of at most {_MOST_GROUPS} kinds of problems that differ in more than length, "
            f"got {count}: choose some with --modes, --lengths, --head-dims, --causal or --full"
        )


def draw(report: Report, path: str) -> None:
    """Writes the picture.

    Args:
        path: its ending names the format.

    Raises:
        ValueError: see `check`; or nothing was measured.
    """
    check(path, report.rows)
    figure_of(report).savefig(path, dpi=150)


def figure_of(report: Report) -> Any:
    """The picture as a matplotlib figure: two panels for each group of problems."""
    found = groups([r for r in report.rows if any(c.status == "measured" for c in r.cells)])
    if not found:
        raise ValueError("nothing was measured that a plot could show")
    height = 1.3 + 3.6 * len(found)
    # Without pyplot, which would choose a display for the whole process.
    figure = load("matplotlib.figure").Figure(figsize=(11, height))
    axes = figure.subplots(len(found), 2, squeeze=False)
    styles = _styles(report.peers)
    for group, (left, right) in zip(found, axes, strict=True):
        _time(left, group, styles)
        _memory(right, group, styles)
    _frame(figure, axes, report, found, height)
    return figure


def _styles(peers: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A colour and a marker for each peer, the same in all panels; ours are drawn heavier."""
    colours = load("matplotlib").colormaps["tab10"].colors
    return {
        peer: {
            "color": colours[i % len(colours)],
            "marker": _MARKERS[i % len(_MARKERS)],
            "label": peer,
            # Where lines lie on one another the first one's marker still shows.
            "markersize": max(4, 10 - 1.5 * i),
            "linewidth": 2.6 if peer.startswith("flash_attention") else 1.5,
            "linestyle": "-" if i < len(colours) else "--",
            "zorder": 3 if peer.startswith("flash_attention") else 2,
        }
        for i, peer in enumerate(peers)
    }


def _points(group: Group, peer: str) -> list[tuple[Row, Cell]]:
    cells = ((row, row.cell(peer)) for row in group.rows)
    return [(row, cell) for row, cell in cells if cell is not None and cell.status == "measured"]


def _time(axis: Any, group: Group, styles: dict[str, dict[str, Any]]) -> None:
    for peer, style in styles.items():
        points = _points(group, peer)
        if not points:
            continue
        lengths = [row.workload.length for row, _ in points]
        middle = [1e3 * cell.seconds for _, cell in points]
        low, high = zip(*(cell.quartiles for _, cell in points), strict=True)
        axis.plot(lengths, middle, **style)
        bounds = ([1e3 * x for x in low], [1e3 * x for x in high])
        axis.fill_between(lengths, *bounds, color=style["color"], alpha=0.2, linewidth=0)
    axis.set_ylabel("time of a call (ms)")
    _scales(axis, group)


def _memory(axis: Any, group: Group, styles: dict[str, dict[str, Any]]) -> None:
    for peer, style in styles.items():
        points = [(r.workload.length, c.memory / 2**20) for r, c in _points(group, peer) if c.memory]
        if points:
            axis.plot(*zip(*points, strict=True), **style)
    if not axis.lines:
        axis.text(0.5, 0.5, "not reported here", ha="center", va="center", transform=axis.transAxes)
    lengths = [row.workload.length for row in group.rows]
    axis.plot(lengths, [_matrix(row.workload) / 2**20 for row in group.rows], **_MATRIX)
    axis.set_ylabel("memory beside the inputs (MiB)")
    _scales(axis, group)


def _matrix(w: Workload) -> int:
    """Bytes of the logits of all heads, float32 (float64 for float64)."""
    return w.batch * w.N * w.length * w.S * (8 if w.dtype == "float64" else 4)


def _scales(axis: Any, group: Group) -> None:
    """Logarithmic axes, with plain numbers: every length, and of the values 1, 2, 5, 10 and so on."""
    ticker = load("matplotlib.ticker")
    lengths = [row.workload.length for row in group.rows]
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_locator(ticker.FixedLocator(lengths))
    axis.xaxis.set_major_formatter(ticker.FuncFormatter(_plain))
    axis.xaxis.set_minor_locator(ticker.NullLocator())
    if len(lengths) == 1:
        axis.set_xlim(lengths[0] / 2, lengths[0] * 2)
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if high < 500 * low else (1,)))
    axis.yaxis.set_major_formatter(ticker.FuncFormatter(_plain))
    axis.yaxis.set_minor_locator(ticker.NullLocator())
    axis.grid(True, alpha=0.35)
    axis.set_xlabel("length of queries" if group.rows[0].workload.kv_length else "length of queries and keys")


def _plain(value: float, _: int) -> str:
    return f"{value:,g}"


def _frame(figure: Any, axes: Any, report: Report, found: Sequence[Group], height: float) -> None:
    """The device above, one legend for all panels below it, and each group's name above its panels."""
    handles: dict[str, Any] = {}
    told = {c.peer for row in report.rows for c in row.cells if c.memory}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            silent = label not in told and label != _MATRIX["label"]
            handles.setdefault(label + " (memory not reported)" * silent, handle)
    columns = min(3, len(handles))
    figure.suptitle(heading(report), fontsize=12, y=1 - 0.12 / height, va="top")
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, 1 - 0.4 / height)}
    figure.legend(handles.values(), handles, ncols=columns, frameon=False, **place)
    for group, (left, _) in zip(found, axes, strict=True):
        left.set_title(group.title, loc="left", fontsize=11, fontweight="bold", pad=10)
    figure.tight_layout(rect=(0, 0, 1, 1 - (0.5 + 0.23 * -(-len(handles) // columns)) / height), h_pad=1.5)
