"""Figures: numbers in, PNG bytes out. They read without colour: by marker, line style and hatch."""

import io

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

# curve -> label, marker, line style, colour (the colours differ in lightness too)
TRAINED = {
    "ticket": ("ticket: large_final mask, initial weights", "o", "-", "#00429d"),
    "reinit": ("same mask, weights drawn anew", "s", "--", "#d9722e"),
    "random": ("random mask, initial weights", "^", ":", "#7a7a7a"),
}
UNTRAINED = {
    "large_final_same_sign_signed_constant": (
        "large_final_same_sign, signed constants",
        "D",
        "-",
        "#00429d",
    ),
    "large_final_same_sign": ("large_final_same_sign, initial weights", "o", "--", "#2e8b57"),
    "large_final": ("large_final, initial weights", "s", "-.", "#d9722e"),
    "random": ("random mask, initial weights", "^", ":", "#7a7a7a"),
}


def quickstart(numbers: dict) -> bytes:
    """Tickets and supermasks over density, and the time of a step, from `quickstart.quickstart`."""
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    trained, untrained, times = figure.subplots(1, 3, width_ratios=(5, 5, 3))
    dense = numbers["dense"]["accuracy"]
    trained.axhline(dense, color="black", linewidth=1, label=f"dense network, {dense:.1%}")
    _curves(trained, numbers, TRAINED)
    trained.set_title("Trained: the ticket and its controls")
    trained.set_ylabel("test accuracy at lowest validation loss")
    trained.legend(loc="lower left", frameon=False)

    init = numbers["supermask"]["init"][0]["accuracy"]
    untrained.axhline(
        init, color="black", linewidth=1, label=f"initial weights, no mask, {init:.1%}"
    )
    _curves(untrained, numbers["supermask"], UNTRAINED)
    untrained.set_title("Untrained: the supermask effect")
    untrained.set_ylabel("test accuracy, untrained")
    untrained.set_ylim(0, 1)
    untrained.legend(loc="center left", bbox_to_anchor=(0, 0.33), frameon=False)

    _times(times, numbers["timings"])
    figure.suptitle(
        f"LeNet-300-100 on {numbers['dataset']}, seed {numbers['seed']}, "
        f"{numbers['iterations']} iterations per training",
    )
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=130)
    return png.getvalue()


def _curves(axes: Axes, curves: dict, styles: dict) -> None:
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


def _times(axes: Axes, timings: dict) -> None:
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
        axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=9)
    axes.set_yticks(list(places), [row["layer"] for row in rows])
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_title(f"Training step at {timings['density']:.1%} kept")
    axes.set_xlabel(f"milliseconds, batch {timings['batch']}, {timings['threads']} thread")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper right", bbox_to_anchor=(1, 0.75), frameon=False)
