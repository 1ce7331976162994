"""Pictures of a results file: how near each op comes to what bounds it, how it grows, and how it stands among peers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf_engine.bench.case import OURS
from rlhf_engine.bench.records import Record, Run
from rlhf_engine.bench.table import duration
from rlhf_engine.bench.table import size as size_text
from rlhf_engine.plots import INK, LINE, MUTED, PAPER, REWARD, style

COLOURS = ("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#666c75", "#b5a300", "#7a5195")
BARE = "bare products"


def draw(run: Run, folder: Path) -> list[Path]:
    """roof, growth and peers, each as SVG and PNG; of what the file does not hold there is no picture."""
    folder.mkdir(parents=True, exist_ok=True)
    timed = [record for record in run.records if record.timed]
    sketches: dict[str, tuple[Callable[[Any, Any], None], Any, float]] = {}
    if ours := [x for x in timed if x.way == OURS and roof_share(x) is not None and x.suite != "sweep"]:
        sketches["roof"] = (roof, ours, 1.0 + 0.19 * len(ours))
    if swept := [x for x in timed if x.suite == "sweep"]:
        sketches["growth"] = (growth, swept, 5.6)
    if compared := groups([x for x in timed if x.suite != "sweep"]):
        sketches["peers"] = (bars, compared, 1.0 + sum(0.3 + 0.19 * (len(group) - 1) for group in compared))
    paths = []
    for name, (sketch, what, height) in sketches.items():
        with style() as figure:
            made = figure(9.0, height)
            sketch(made, what)
            made.suptitle(f"{TITLES[name]}\n{run.title}", x=0.01, ha="left", fontsize=9, color=INK)
            for kind in ("svg", "png"):
                paths.append(folder / f"{name}.{kind}")
                made.savefig(paths[-1], facecolor=PAPER, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    return paths


TITLES = {
    "roof": "Share of this machine's own limit: its copy rate, or its rate of matrix products, whichever bounds the op",
    "growth": "The policy loss of the head, forward and backward, as rows and vocabulary grow",
    "peers": "Time over that of ours: same problem, same run, answers checked (logarithmic; left of 1 is faster)",
}


def roof_share(record: Record) -> float | None:
    """Of the larger of the two least times: to move the bytes, and to do the products."""
    shares = [x for x in (record.copy_share, record.matmul_share) if x is not None]
    return max(shares) if shares else None


def roof(figure: Any, records: list[Record]) -> None:
    ax = figure.add_subplot()
    places = list(range(len(records)))[::-1]
    shares = [100 * (roof_share(x) or 0) for x in records]
    by_products = [(x.matmul_share or 0) > (x.copy_share or 0) for x in records]
    ax.hlines(places, 0, shares, color=LINE, linewidth=2)
    for products, label, colour in ((False, "bytes", REWARD), (True, "products", COLOURS[0])):
        chosen = [i for i, by in enumerate(by_products) if by == products]
        ax.plot([shares[i] for i in chosen], [places[i] for i in chosen], "o", color=colour, label=f"bound by {label}")
    ax.set_yticks(places, [f"{x.op}, {x.shape} ({x.dtype})" for x in records], fontsize=7)
    ax.axvline(100, color=MUTED, linewidth=0.8, linestyle=":")
    ax.set_xlim(0, max(105, *shares))
    ax.set_xlabel("% of the limit")
    ax.legend(frameon=False, loc="lower right")


def growth(figure: Any, records: list[Record]) -> None:
    axes = figure.subplots(2, 2)
    ways = list(dict.fromkeys(x.way for x in records if x.way != BARE))
    colours = {way: REWARD if way == OURS else COLOURS[i % len(COLOURS)] for i, way in enumerate(ways)}
    for column, (shape, size) in enumerate((("over N", "N"), ("over V", "V"))):
        swept = [x for x in records if x.shape == shape]
        for row, what in enumerate(("time", "memory beyond the inputs")):
            ax = axes[row][column]
            for way in ways:
                mine = sorted((x for x in swept if x.way == way), key=lambda x: x.dims[size])
                points = [(x.dims[size], x.peak_bytes if row else x.seconds) for x in mine]
                points = [(a, b) for a, b in points if b]
                if points:
                    ax.plot(*zip(*points, strict=True), "o-", markersize=3, color=colours[way], label=way)
            ax.set_xscale("log")
            ax.set_xticks(sorted({x.dims[size] for x in swept}))
            plain(ax.xaxis, lambda count, _: f"{count:,.0f}")
            ax.tick_params("x", rotation=30)
            ax.set_xlabel("rows" if size == "N" else "vocabulary")
            ax.set_ylabel(what)
            if ax.lines:
                ax.set_yscale("log")
                plain(ax.yaxis, lambda y, _, row=row: size_text(int(y)) if row else duration(y))
            else:
                ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center", color=MUTED)
    axes[0][0].legend(frameon=False, fontsize=7)


def plain(axis: Any, text: Callable[..., str]) -> None:
    """Numbers as people write them, for both kinds of ticks; a few of the smaller ones would do, so they get none."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(text))
    axis.set_minor_formatter(NullFormatter())


def groups(records: list[Record]) -> list[list[Record]]:
    """The ways of each op at its first size, ours first; without those of which there is nothing but ours."""
    first: dict[str, str] = {}
    for record in records:
        first.setdefault(record.op, record.name)
    found = [[x for x in records if x.name == name and x.times_ours] for name in first.values()]
    return [group for group in found if len(group) > 1 and group[0].way == OURS]


def bars(figure: Any, compared: list[list[Record]]) -> None:
    ax = figure.add_subplot()
    place, ticks, bold = 0.0, [], {"fontsize": 7, "fontweight": "bold"}
    for group in compared:
        title = f"{group[0].op}, {group[0].shape}: ours {duration(group[0].seconds)}"
        ax.text(0, place, title, transform=ax.get_yaxis_transform(), va="center", **bold)
        for record in group[1:]:
            place -= 1
            times = (record.times_ours_device if record.device else record.times_ours) or 1.0
            ax.barh(place, times - 1, left=1, height=0.6, color=MUTED if record.way == BARE else REWARD)
            ax.annotate(f"{times:.3g}", (times, place), (3, 0), textcoords="offset points", fontsize=7, va="center")
            ticks.append((place, record.way))
        place -= 1.6
    ax.set_xscale("log")
    plain(ax.xaxis, lambda times, _: f"{times:g}")
    ax.axvline(1, color=INK, linewidth=0.8)
    ax.set_yticks([where for where, _ in ticks], [way for _, way in ticks], fontsize=7)
    ax.margins(x=0.1, y=0.02)
    ax.set_xlabel("times ours")
