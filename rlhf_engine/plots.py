"""Figures of a run: drawn on axes that the caller owns, so that report.html and the README's picture share them.

Colours are fixed sentinels (Okabe and Ito's colour-blind safe set, and greys). `svg` turns them into CSS variables, so
that one inline figure follows the page from light to dark; a PNG just shows them.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

REWARD, JUDGE, GOOD = "#0072b2", "#d55e00", "#009e73"
PHASES = {"rollout": "#cc79a7", "score": "#e69f00", "update": "#009e73"}
INK, MUTED, LINE, PAPER = "#1b1d21", "#666c75", "#c9cdd3", "#fffffe"
VARIABLES = {
    REWARD: "--reward", JUDGE: "--judge", GOOD: "--good", "#cc79a7": "--rollout", "#e69f00": "--score", INK: "--ink",
    MUTED: "--muted", LINE: "--line", PAPER: "--paper",
}  # fmt: skip
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans", "font.size": 9, "text.color": INK, "text.parse_math": False,
    "svg.fonttype": "none", "axes.edgecolor": LINE, "axes.linewidth": 0.7, "axes.labelcolor": MUTED,
    "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left", "axes.axisbelow": True,
    "xtick.color": LINE, "ytick.color": LINE, "xtick.labelcolor": MUTED, "ytick.labelcolor": MUTED,
    "xtick.major.width": 0.7, "ytick.major.width": 0.7, "xtick.major.size": 3, "ytick.major.size": 3,
    "lines.linewidth": 1.6, "lines.solid_capstyle": "round", "figure.constrained_layout.use": True,
}  # fmt: skip
# The learning curves that matter, their colour, and the healthy band of those that have one.
CURVES: dict[str, tuple[str, tuple[float, float] | None]] = {
    "score/mean": (REWARD, None), "judge/mean": (JUDGE, None), "kl/sequence": (INK, None), "entropy": (INK, None),
    "policy/clip_fraction": (INK, (0.01, 0.3)), "value/explained_variance": (INK, (0.2, 1.0)),
}  # fmt: skip
MANY_STEPS = 60  # beyond this a curve is shown as a running mean over its faint self

Row = dict[str, Any]


def finite(value: Any) -> float:
    """A number for plotting: NaN where the run has none."""
    try:
        return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else math.nan
    except OverflowError:  # an int beyond every float
        return math.nan


def rows_of(summary: Row, *path: str) -> list[Row]:
    """The list of records at a path of the summary; empty where there is none."""
    found: Any = summary
    for key in path:
        found = found.get(key) if isinstance(found, dict) else None
    return [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []


def duration(seconds: Any) -> str:
    x = finite(seconds)
    if math.isnan(x):
        return "–"
    return f"{x:.1f} s" if x < 90 else f"{x / 60:.1f} min" if x < 5400 else f"{x / 3600:.1f} h"


def root(value: Any) -> float:
    x = finite(value)
    return x if math.isnan(x) else math.sqrt(max(0.0, x))  # an estimate of a small KL may be negative


def short(name: str, limit: int = 20) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "…"


@contextmanager
def style() -> Iterator[Any]:
    """matplotlib without a display, in the report's dress; yields a maker of figures."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def figure(width: float, height: float) -> Any:
        made = Figure(figsize=(width, height))
        FigureCanvasAgg(made)  # no pyplot: its global state would outlive the report
        made.patch.set_alpha(0)
        return made

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the browser brings its own fonts
        yield figure


def svg(name: str, label: str, width: float, height: float, draw: Callable[[Any], None]) -> str:
    """An inline <svg> of what `draw(figure)` draws; `name` keeps its ids apart from other figures of the page."""
    import matplotlib
    from markupsafe import escape

    with style() as figure, matplotlib.rc_context({"svg.hashsalt": name}):
        made = figure(width, height)
        draw(made)
        out = io.StringIO()
        made.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    body = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", out.getvalue(), flags=re.DOTALL)
    body = body[body.index("<svg") :]
    body = re.sub(r"<[^>]*>", lambda tag: _page_tag(tag[0], name), body)
    view = f'viewBox="0 0 {width * 72:g} {height * 72:g}" style="max-width:{width * 100:.0f}px"'
    return re.sub(r"<svg[^>]*>", lambda _: f'<svg {view} role="img" aria-label="{escape(label)}">', body, count=1)


def _page_tag(tag: str, name: str) -> str:
    """One SVG tag made fit to live in a page: own ids, the page's colours and fonts."""
    for colour, variable in VARIABLES.items():
        tag = tag.replace(colour, f"var({variable})")
    tag = re.sub(r"font:\s*(\d+\s+)?([\d.]+px)[^;\"]*", lambda m: f"font-weight: {m[1] or 400}; font-size: {m[2]}", tag)
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", tag)


def end_label(ax: Any, x: float, y: float, text: str, colour: str) -> None:
    ax.annotate(text, (x, y), xytext=(5, 0), textcoords="offset points", va="center", color=colour, fontweight="bold")


def curve(
    ax: Any,
    rows: Sequence[Row],
    key: str,
    *,
    colour: str = INK,
    band: tuple[float, float] | None = None,
    digits: int = 2,
) -> None:
    """One metric over PPO steps, its last value written at its end, its healthy band shaded."""
    points = [(finite(r.get("step")), finite(r.get(key))) for r in rows]
    points = [p for p in points if not math.isnan(p[0] + p[1])]
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    if band:
        ax.axhspan(*band, color=GOOD, alpha=0.1, linewidth=0)
    if len(xs) > MANY_STEPS:
        ax.plot(xs, ys, color=colour, alpha=0.3, linewidth=0.8)
        half = len(xs) // 40
        ys = [sum(w) / len(w) for w in (ys[max(0, i - half) : i + half + 1] for i in range(len(ys)))]
    ax.plot(xs, ys, color=colour, marker="o" if len(xs) <= 3 else None, markersize=4)
    if xs:
        end_label(ax, xs[-1], ys[-1], f"{ys[-1]:.{digits}f}", colour)
    ax.margins(x=0.02, y=0.12)
    ax.xaxis.get_major_locator().set_params(integer=True)


def overoptimisation(axes: Sequence[Any], points: Sequence[Row], trail: Sequence[Row]) -> None:
    """Reward, and below it the judge if there are two axes, against the square root of KL (Gao et al. 2023)."""
    keys = [("reward", "score/mean", REWARD, "reward"), ("judge", "judge/mean", JUDGE, "judge")]
    for ax, (key, metric, colour, label) in zip(axes, keys, strict=False):
        passing = [(root(r.get("kl/sequence")), finite(r.get(metric))) for r in trail]
        ax.plot(
            *zip(*passing, strict=True),
            ".",
            color=colour,
            alpha=0.5 if len(trail) < MANY_STEPS else 0.2,
            markersize=5,
            markeredgewidth=0,
        ) if passing else None
        xs = [root(p.get("kl")) for p in points]
        ys = [finite(p.get(key)) for p in points]
        ax.plot(xs, ys, color=colour, marker="o", markersize=6, markeredgecolor=PAPER, markeredgewidth=1)
        ax.set_ylabel(label, color=colour)
        ax.margins(x=0.08, y=0.28)
    backing = {"boxstyle": "square,pad=0.1", "facecolor": PAPER, "edgecolor": "none", "alpha": 0.75}
    for i, p in enumerate(points):
        # Under the curve and above it by turns; the last always above, where the axis ends.
        under = i % 2 == 0 and i < len(points) - 1
        axes[0].annotate(
            short(str(p.get("model", "")), 14), (root(p.get("kl")), finite(p.get("reward"))), color=MUTED, bbox=backing,
            xytext=(7, -11) if under else (-7, 6), textcoords="offset points", ha="left" if under else "right",
        )  # fmt: skip
    for ax in axes[:-1]:
        ax.tick_params(labelbottom=False)
    axes[-1].set_xlabel("√KL to the reference (KL in nats per response)")


def accuracy_bars(ax: Any, rows: Sequence[tuple[str, float, str]]) -> None:
    """Horizontal bars that start at chance, best on top, each with its name above it and its value at its end."""
    ordered = sorted(rows, key=lambda row: row[1])
    for y, (label, value, colour) in enumerate(ordered):
        ax.barh(y, value - 0.5, left=0.5, height=0.34, color=colour, linewidth=0)
        ax.annotate(label, (min(0.5, value), y + 0.22), xytext=(2, 2), textcoords="offset points", color=INK)
        end_label(ax, max(value, 0.5), y, f"{100 * value:.1f}%", INK if colour == LINE else colour)
    ax.set_xlim(min([0.5, *(row[1] for row in rows)]), 1)
    ax.set_ylim(-0.45, len(ordered) - 0.25)
    ax.set_yticks([])
    ax.spines["left"].set_color(MUTED)
    ax.set_xticks([0.5, 0.6, 0.7, 0.8, 0.9, 1.0], ["50%\nchance", "60%", "70%", "80%", "90%", "100%"])


def reliability(axes: Sequence[Any], bins: Sequence[Row]) -> None:
    """How often people made the choice against how sure the model was; below, how many comparisons each point has."""
    xs, ys = [finite(b.get("confidence")) for b in bins], [finite(b.get("frequency")) for b in bins]
    counts = [finite(b.get("count")) for b in bins]
    axes[0].plot([0.5, 1], [0.5, 1], color=LINE, linewidth=1)
    axes[0].annotate("perfect", (0.62, 0.62), xytext=(-4, 6), textcoords="offset points", ha="right", color=MUTED)
    axes[0].plot(xs, ys, color=REWARD, marker="o", markersize=5, markeredgecolor=PAPER)
    axes[0].set_ylabel("people agreed")
    axes[0].tick_params(labelbottom=False)
    axes[1].bar(xs, counts, width=0.03, color=LINE, linewidth=0)
    for x, count in zip(xs, counts, strict=True):
        if not math.isnan(x + count):
            axes[1].annotate(
                f"{count:.0f}", (x, count), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=7
            )
    axes[1].set_yticks([])
    axes[1].spines["left"].set_visible(False)
    axes[1].margins(y=0.3)
    axes[1].set_xlabel("the model's confidence in its choice")
    for ax in axes:
        ax.set_xlim(0.48, 1.02)
        ax.set_xticks([0.5, 0.6, 0.7, 0.8, 0.9, 1.0])


def whiskers(ax: Any, matches: dict[str, list[Row]], order: Sequence[str]) -> None:
    """Elo with intervals, one row per model, one colour per judge."""
    look = {"reward_model": (REWARD, "by the reward model"), "judge": (JUDGE, "by the judge")}
    present = [name for name in look if matches.get(name)]
    for i, name in enumerate(present):
        colour, label = look[name]
        shift = (i - (len(present) - 1) / 2) * 0.26
        for row in matches[name]:
            y, elo = order.index(row["item"]) + shift, finite(row.get("elo"))
            ax.plot([finite(row.get("low")), finite(row.get("high"))], [y, y], color=colour, linewidth=1.6)
            ax.plot(elo, y, "o", color=colour, markersize=6, markeredgecolor=PAPER)
        best = max(matches[name], key=lambda row: finite(row.get("elo")))
        below = i == 1
        ax.annotate(
            label, (finite(best.get("elo")), order.index(best["item"]) + shift), xytext=(6, -9 if below else 9),
            textcoords="offset points", va="center", ha="right", color=colour, fontweight="bold",
        )  # fmt: skip
    ax.set_yticks(range(len(order)), [short(name, 14) for name in order])
    ax.set_ylim(len(order) - 0.4, -0.7)
    ax.tick_params(axis="y", length=0, labelcolor=INK)
    ax.grid(axis="x", color=LINE, alpha=0.5, linewidth=0.6)
    ax.set_xlabel("Elo (400 points = odds of 10 to 1)")


def phase_bars(ax: Any, rows: Sequence[Row]) -> None:
    """Seconds of every PPO step, stacked by phase; the names stand beside the last bars."""
    xs, base = [finite(r.get("step")) for r in rows], [0.0] * len(rows)
    labels: list[tuple[float, str, str]] = []
    total = sum(_seconds(r, phase) for r in rows for phase in PHASES) or 1.0
    for phase, colour in PHASES.items():
        heights = [_seconds(r, phase) for r in rows]
        tops = [b + h for b, h in zip(base, heights, strict=True)]
        if len(xs) > MANY_STEPS:
            ax.fill_between(xs, base, tops, step="mid", color=colour, linewidth=0)
        else:
            ax.bar(xs, heights, bottom=base, width=0.82, color=colour, linewidth=0)
        labels.append(((base[-1] + tops[-1]) / 2, f"{phase} {100 * sum(heights) / total:.0f}%", colour))
        base = tops
    top, floor = max(base) or 1.0, 0.0
    for y, text, colour in labels:  # a thin phase must not print over its neighbour
        floor = max(y, floor + 0.09 * top)
        end_label(ax, xs[-1] + 0.4, floor, text, colour)
    ax.set_ylabel("seconds")
    ax.set_xlabel("PPO step")
    ax.xaxis.get_major_locator().set_params(integer=True)


def throughput(ax: Any, rows: Sequence[Row]) -> None:
    curve(ax, rows, "tokens_per_second", digits=0)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("PPO step")


def _seconds(row: Row, phase: str) -> float:
    value = finite(row.get(f"seconds/{phase}"))
    return 0.0 if math.isnan(value) else value


def stage_bars(ax: Any, stages: Sequence[tuple[str, float]]) -> None:
    """Stages one after another as one long bar unrolled downwards."""
    start, total = 0.0, sum(s[1] for s in stages) or 1.0
    for y, (name, seconds) in enumerate(stages):
        end = start + seconds
        ax.barh(y, seconds, left=start, height=0.62, color=MUTED, linewidth=0)
        # Right of the bar while there is room, else left of it, else in it.
        x, shift, side, colour = (end, 5, "left", INK) if end < 0.6 * total else (start, -5, "right", INK)
        if side == "right" and start < 0.4 * total:
            x, colour = end, PAPER
        ax.annotate(
            f"{short(name.replace('_', ' '))}  {duration(seconds)}", (x, y), xytext=(shift, 0), va="center", ha=side,
            textcoords="offset points", color=colour,
        )  # fmt: skip
        start = end
    ax.set_ylim(len(stages) - 0.4, -0.6)
    ax.set_xlim(0, total)
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)
    ax.set_xlabel("seconds since the start")


def nothing(ax: Any, words: str) -> None:
    """An empty panel that says why."""
    ax.axis("off")
    ax.text(0.5, 0.5, words, ha="center", va="center", color=MUTED, transform=ax.transAxes)


def training(figure: Any, rows: Sequence[Row], keys: Sequence[str]) -> None:
    """Reward, and below it the judge where there is one, over PPO steps."""
    axes = figure.subplots(len(keys), 1, squeeze=False)[:, 0]
    for ax, key in zip(axes, keys, strict=True):
        colour, label = (REWARD, "reward") if key == "score/mean" else (JUDGE, "judge")
        curve(ax, rows, key, colour=colour)
        ax.set_ylabel(label, color=colour)
    for ax in axes[:-1]:
        ax.tick_params(labelbottom=False)
    axes[-1].set_xlabel("PPO step")


def panels(summary: Row, metrics: list[Row]) -> dict[str, Callable[[Any], Any]]:
    """Name -> how to draw it on a figure; only what the run has."""
    points, bins, bars = rows_of(summary, "curve"), rows_of(summary, "rm", "reliability"), accuracies(summary)
    judged = any(not math.isnan(finite(p.get("judge"))) for p in points)
    met = {name: [r for r in rows_of(summary, "elo", name) if "item" in r] for name in ("reward_model", "judge")}
    players = [r["item"] for rows in met.values() for r in rows]
    order = [name for name in dict.fromkeys([str(p.get("model")) for p in points] + players) if name in players]
    timed = [row for row in metrics if any(f"seconds/{phase}" in row for phase in PHASES)]
    spent = summary.get("seconds")
    spent = spent if isinstance(spent, dict) else {}
    stages = [(name, finite(value)) for name, value in spent.items() if name != "total" and finite(value) > 0]
    trained = [key for key in ("score/mean", "judge/mean") if any(key in row for row in metrics)]
    found: dict[str, tuple[Any, Callable[[Any], Any]]] = {
        "training": (trained, lambda fig: training(fig, metrics, trained)),
        "overoptimisation": (
            len(points) > 1,
            lambda fig: overoptimisation(fig.subplots(1 + judged, 1, squeeze=False)[:, 0], points, metrics),
        ),
        "accuracy": (bars, lambda fig: accuracy_bars(fig.subplots(), bars)),
        "reliability": (bins, lambda fig: reliability(fig.subplots(2, 1, height_ratios=[4, 1]), bins)),
        "elo": (order, lambda fig: whiskers(fig.subplots(), met, order)),
        "phases": (timed, lambda fig: phase_bars(fig.subplots(), timed)),
        "stages": (stages, lambda fig: stage_bars(fig.subplots(), stages)),
        "throughput": (
            any("tokens_per_second" in row for row in metrics),
            lambda fig: throughput(fig.subplots(), metrics),
        ),
    }
    return {name: draw for name, (has, draw) in found.items() if has}


def accuracies(summary: Row) -> list[tuple[str, float, str]]:
    """(name, accuracy, colour) of all that predicts people's choices."""
    rm = summary.get("rm")
    rows = [
        ("human_pair_accuracy", "this reward model", REWARD),
        ("scalar_rm_accuracy", "the same, trained on mean ratings", LINE),
        ("baseline_tfidf_ridge", "tf-idf and ridge regression (baseline)", LINE),
        ("judge_accuracy", "the independent judge", JUDGE),
        ("ceiling_mean_of_raters", "people’s mean (ceiling)", GOOD),
        ("human_same_rater_vs_others", "one person against the others’ mean", GOOD),
        ("human_rater_vs_rater", "one person against another", GOOD),
    ]
    known = [(label, finite(rm.get(key)), colour) for key, label, colour in rows] if isinstance(rm, dict) else []
    return [row for row in known if not math.isnan(row[1])]


def _curve_figure(figure: Any, **options: Any) -> None:
    curve(figure.subplots(), **options)


def curves(metrics: list[Row]) -> dict[str, str]:
    """Metric -> inline SVG of its learning curve, for those that the run has."""
    out = {}
    for i, (key, (colour, band)) in enumerate(CURVES.items()):
        if any(key in row for row in metrics):
            draw = partial(_curve_figure, rows=metrics, key=key, colour=colour, band=band)
            out[key] = svg(f"curve{i}", f"{key} over PPO steps", 3.6, 2.0, draw)
    return out


def figures(summary: Row, metrics: list[Row]) -> dict[str, str]:
    """Name -> inline SVG; a figure that the run has no data for is an empty string."""
    about = {
        "overoptimisation": ("Reward and judge against the square root of KL", 4.2, 3.5),
        "accuracy": ("Share of people's choices predicted", 4.2, 3.7),
        "reliability": ("Confidence against agreement", 4.2, 3.7),
        "elo": ("Elo of the models with intervals", 4.2, 2.6),
        "phases": ("Seconds per PPO step by phase", 3.6, 2.2),
        "throughput": ("Response tokens per second", 3.6, 2.2),
        "stages": ("Seconds per stage", 3.6, 2.2),
    }
    drawn = panels(summary, metrics)
    return {name: svg(name, *size, drawn[name]) if name in drawn else "" for name, size in about.items()}


def mosaic(path: Path, headline: str, summary: Row, metrics: list[Row]) -> Path:
    """The four figures that tell a run, on one PNG of 1600 x 900 pixels."""
    quarters = {
        "training": ("Over training", "no PPO in this run"),
        "overoptimisation": ("Reward and judge against √KL, held-out prompts", "no evaluated models in this run"),
        "elo": ("Head to head, with intervals", "models have not met"),
        "accuracy": ("People’s choices predicted", "no reward model was graded"),
    }
    drawn = panels(summary, metrics)
    bars = [bar for bar in accuracies(summary) if "person" not in bar[0]]  # those two are for scale, in the report
    if bars:
        drawn["accuracy"] = lambda fig: accuracy_bars(fig.subplots(), bars)
    with style() as figure:
        made = figure(16 / 1.5, 9 / 1.5)
        made.patch.set(facecolor="white", alpha=1)
        made.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
        made.suptitle(
            headline, x=0.012, ha="left", fontsize=min(13.0, 1170 / len(headline)), fontweight="bold", color=INK
        )
        for part, (name, (title, missing)) in zip(
            made.subfigures(2, 2, hspace=0.06).flat, quarters.items(), strict=True
        ):
            part.suptitle(title, x=0.025, ha="left", fontsize=10, color=INK)
            drawn.get(name, lambda fig, words=missing: nothing(fig.subplots(), words))(part)
        made.savefig(path, dpi=150, metadata={"Software": None})
    return path
