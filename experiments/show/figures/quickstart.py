"""The figure of `quickstart`: numbers in, PNG bytes out. It reads without colour, and on a phone.

Panels lie below each other; the title of each is its result.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

Curves = Mapping[str, Sequence[Mapping[str, Any]]]

# curve -> label, marker, line style, colour (the colours differ in lightness too)
TRAINED = {
    "ticket": ("ticket", "o", "-", "#00429d"),
    "reinit": ("the same mask, weights drawn anew", "s", "--", "#b85412"),
    "random": ("a random mask", "^", ":", "#6f6f6f"),
}
UNTRAINED = {
    "large_final_same_sign_signed_constant": (
        "large_final_same_sign, signed constants", "D", "-", "#00429d",
    ),
    "large_final_same_sign": ("large_final_same_sign", "o", "--", "#1b7837"),
    "large_final": ("large_final", "s", "-.", "#b85412"),
    "random": ("a random mask", "^", ":", "#6f6f6f"),
}  # fmt: skip
SIZE, DPI = (6.2, 11.0), 130
STYLE = {"font.family": "DejaVu Sans", "font.size": 11.5}


def quickstart(numbers: dict) -> bytes:
    """Tickets and supermasks over density, and the time of a step, from `quickstart.quickstart`."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=SIZE, layout="constrained")
        figure.suptitle(_facts(numbers), fontsize=10, x=0.01, ha="left")
        trained, untrained, times = figure.subplots(3, 1, height_ratios=(5, 5, 3))

        dense = numbers["dense"]["accuracy"]
        trained.axhline(dense, color="black", linewidth=1, label="dense network")
        _curves(trained, numbers, TRAINED)
        _result(trained, ticket_result(numbers))
        trained.set_ylabel("test accuracy, trained")
        trained.legend(loc="lower left", frameon=False)

        init = numbers["supermask"]["init"][0]["accuracy"]
        untrained.axhline(init, color="black", linewidth=1, label="no mask")
        _curves(untrained, numbers["supermask"], UNTRAINED)
        _result(untrained, supermask_result(numbers))
        untrained.set_ylabel("test accuracy, untrained")
        untrained.set_ylim(0, 1)
        untrained.legend(loc="center left", bbox_to_anchor=(0, 0.36), frameon=False)

        _times(times, numbers["timings"])
        _result(times, time_result(numbers["timings"]))
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=DPI)
        return png.getvalue()


def ticket_result(numbers: Mapping[str, Any]) -> str:
    """The sparsest ticket that is as accurate as the dense network, or the best one."""
    dense, tickets = numbers["dense"]["accuracy"], numbers["ticket"]
    as_good = [point for point in tickets if point["accuracy"] >= dense]
    if not as_good:
        best = max(tickets, key=lambda point: point["accuracy"])
        return f"The best ticket reaches {best['accuracy']:.1%}, the dense network {dense:.1%}"
    least = min(as_good, key=lambda point: point["density"])
    return (
        f"A ticket of {least['density']:.1%} of the weights reaches {least['accuracy']:.1%},\n"
        f"the dense network {dense:.1%}"
    )


def supermask_result(numbers: Mapping[str, Any]) -> str:
    curves = {name: numbers["supermask"][name] for name in UNTRAINED}
    best = max(point["accuracy"] for points in curves.values() for point in points)
    init = numbers["supermask"]["init"][0]["accuracy"]
    return f"Never trained: a mask alone takes\nthe network from {init:.1%} to {best:.1%}"


def time_result(timings: Mapping[str, Any]) -> str:
    ratio = timings["step"]["dense_ms"] / timings["step"]["compact_ms"]
    density, threads = timings["density"], timings["threads"]
    return (
        f"With {density:.1%} kept a training step is {ratio:.1f} times as fast\n"
        f"(batch {timings['batch']}, {threads} thread{'s' * (threads > 1)})"
    )


def _facts(numbers: Mapping[str, Any]) -> str:
    return (
        f"LeNet-300-100 on {numbers['dataset']}, seed {numbers['seed']}, "
        f"{numbers['iterations']} iterations per training"
    )


def _result(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=12.5, fontweight="bold")


def _curves(axes: Axes, curves: Curves, styles: Mapping[str, tuple[str, str, str, str]]) -> None:
    for name, (label, marker, line, color) in styles.items():
        density = [point["density"] for point in curves[name]]
        accuracy = [point["accuracy"] for point in curves[name]]
        axes.plot(density, accuracy, line, marker=marker, color=color, label=label, markersize=5)
    axes.set_xscale("log")
    axes.invert_xaxis()
    axes.set_xticks([1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:g}%"))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("weights kept (log scale)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _times(axes: Axes, timings: Mapping[str, Any]) -> None:
    rows = [*timings["layers"], {"layer": "whole step", **timings["step"]}]
    places = range(len(rows))
    for key, label, shift, color, hatch in (
        ("dense_ms", "nn.Linear", -0.2, "#c8c8c8", ""),
        ("compact_ms", "CompactLinear", 0.2, "#00429d", "//"),
    ):
        bars = axes.barh(
            [place + shift for place in places],
            [row[key] for row in rows],
            height=0.38,
            color=color,
            edgecolor="black",
            hatch=hatch,
            label=label,
        )
        axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.set_yticks(list(places), [row["layer"] for row in rows])
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel("milliseconds")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper right", bbox_to_anchor=(1, 0.72), frameon=False)
