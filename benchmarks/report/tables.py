"""Rows of a suite as tables of ratios."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Row = dict[str, Any]
PEERS = ("sparseprop", "sparselab")  # how names of peers begin


def _row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _table(head: tuple[str, ...], lines: list[tuple]) -> str:
    return "\n".join([_row(*head), _row(*["---"] * len(head)), *(_row(*line) for line in lines)])


class Times:
    """The minima of one place, such as a layer at a batch, in microseconds."""

    def __init__(self, rows: list[Row], dense: tuple[str, ...]):
        self._times = {(r["contender"], r["density"]): r["min_us"] for r in rows}
        self.contenders = list(dict.fromkeys(r["contender"] for r in rows))
        # of the contenders that cost the same at every density
        at_any = {c: t for (c, _), t in self._times.items()}
        self.dense = min((at_any[name] for name in dense if name in at_any), default=None)

    def of(self, contender: str, density: float) -> float | None:
        return self._times.get((contender, density))

    def ratios(self, contender: str, densities: list[float], base: float | None = None) -> list:
        """Ratio to `base` (default: dense), one per density, "" where there is none."""
        base = base or self.dense
        return [
            f"{base / t:.2f}" if base and (t := self.of(contender, d)) else "" for d in densities
        ]

    def best_peer(self, density: float) -> tuple[str, float] | None:
        peers = [c for c in self.contenders if c.startswith(PEERS)]
        times = [(t, c) for c in peers if (t := self.of(c, density))]
        return (min(times)[1], min(times)[0]) if times else None


def _places(rows: list[Row], fields: tuple[str, ...], dense: tuple[str, ...]) -> dict[tuple, Times]:
    found = dict.fromkeys(tuple(r[field] for field in fields) for r in rows)
    return {
        place: Times([r for r in rows if tuple(r[f] for f in fields) == place], dense)
        for place in found
    }


def _densities(rows: list[Row]) -> list[float]:
    return sorted({r["density"] for r in rows}, reverse=True)


def _contenders(
    rows: list[Row],
    fields: tuple[str, ...],
    dense: tuple[str, ...],
    base: str,
    any_density: tuple[str, ...],
    special: Callable[[Times, str, list[float]], list | None] = lambda *_: None,
) -> str:
    """Contenders down, densities across; `base` names the dense time that ratios are to."""
    densities = _densities(rows)
    lines = []
    for place, times in _places(rows, fields, dense).items():
        where = (", ".join(map(str, place)), f"{times.dense:.0f}" if times.dense else "")
        for contender in times.contenders:
            if (contender,) == dense:
                continue
            cells = special(times, contender, densities)
            cells = cells or times.ratios(contender, densities)
            if contender in any_density:
                cells = [next(filter(None, cells), "")] * len(cells)
            lines.append((*where, contender, *cells))
            where = ("", "")
    head = (", ".join(fields), f"{base} µs", "contender", *(f"{d:g}" for d in densities))
    return _table(head, lines)


def _summary(
    rows: list[Row], fields: tuple[str, ...], dense: tuple[str, ...], base: str, ours: str
) -> str:
    """Ours in relation to dense, to what was pruned, and to the best peer."""
    lines = []
    for place, times in _places(rows, fields, dense).items():
        where = ", ".join(map(str, place))
        for density in _densities(rows):
            mine = times.of(ours, density)
            if not mine or not times.dense:
                continue
            ratio, peer = times.dense / mine, times.best_peer(density)
            against = (
                (peer[0], f"{times.dense / peer[1]:.2f}", f"{peer[1] / mine:.2f}")
                if peer
                else ("none", "", "")
            )
            lines.append(
                (where, f"{density:g}", f"{ratio:.2f}", f"{ratio * density:.2f}", *against)
            )
            where = ""
    head = (
        ", ".join(fields), "density", f"{ours}, ratio to {base}", "of 1/density", "best peer",
        "its ratio", f"{ours} over it",
    )  # fmt: skip
    return _table(head, lines)


# ---- one function per suite ----------------------------------------------------------------------


def masked_linear(rows: list[Row]) -> str:
    def count(times: Times, contender: str, densities: list[float]) -> list | None:
        if contender != "count" or not times.dense:
            return None
        return [f"{t / times.dense:.1%}" if (t := times.of("count", d)) else "" for d in densities]

    return "\n\n".join([
        "## One step of a masked linear layer: forward, dx, dW",
        "Ratio to `F.linear`, by density. `count` is the share of the F.linear step that counting "
        "the mask once takes. Contenders: benchmarks/cpu/bench_masked_linear.py.",
        _contenders(
            rows, ("layer", "batch"), ("F.linear",), "F.linear", ("bare mm", "prune"), count
        ),
    ])  # fmt: skip


def compact_linear(rows: list[Row]) -> str:
    place, dense = ("layer", "batch"), ("F.linear",)

    def own_base(times: Times, contender: str, densities: list[float]) -> list | None:
        dense = f"F.linear {contender.rpartition(' ')[2]}"
        if not contender.endswith((" forward", " bf16")):
            return None
        base = times.of(dense, densities[0])
        if contender == dense:
            return [f"{base:.0f} µs"] * len(densities) if base else None
        return times.ratios(contender, densities, base) if base else None

    return "\n\n".join([
        "## One step of a compact linear layer: forward, dx, dvalues",
        "Ratio to `F.linear`, by density; forward only: to `F.linear forward`; bfloat16: to "
        "`F.linear bf16`. Contenders: benchmarks/cpu/bench_compact_linear.py.",
        _summary(rows, place, dense, "F.linear", "ls compact"),
        _contenders(
            rows, place, dense, "F.linear", ("F.linear kept", "bare mm", "prune"), own_base
        ),
    ])  # fmt: skip


def compact_conv2d(rows: list[Row]) -> str:
    place, dense = ("layer", "batch"), ("F.conv2d", "F.conv2d channels_last")
    return "\n\n".join([
        "## One step of a compact 3x3 convolution: forward, dx, dvalues",
        "Ratio to `F.conv2d` in the faster of its two layouts, by density. Contenders: "
        "benchmarks/cpu/bench_compact_conv2d.py.",
        *(
            _summary(rows, place, dense, "F.conv2d", ours)
            for ours in ("ls compact", "ls compact channels_last")
        ),
        _contenders(rows, place, dense, "faster F.conv2d", (*dense, "prune")),
    ])  # fmt: skip


def lenet_step(rows: list[Row]) -> str:
    dense = ("torch", "torch fused", "torch processes", "torch fused processes")
    lines = []
    for network in dict.fromkeys(r["network"] for r in rows):
        those = [r for r in rows if r["network"] == network]
        base = {r["contender"]: r["min_us"] for r in those if r["contender"] in dense}
        where = network
        for r in sorted(those, key=lambda r: (r["contender"] not in dense, -r["density"])):
            ratios = [f"{base[name] / r['min_us']:.2f}" if name in base else "" for name in dense]
            density = "any" if r["contender"] in dense else f"{r['density']:g}"
            lines.append((where, density, r["contender"], f"{r['min_us']:.0f}", *ratios))
            where = ""
    head = ("network", "density", "contender", "µs", *(f"over {name}" for name in dense))
    return "\n\n".join([
        "## One training step of LeNet-300-100 with Adam, batch 60",
        "By density of the hidden layers; one network on one thread, 45 on two; for 20 rounds of "
        "pruning the sum of one step in each. Contenders: "
        "benchmarks/cpu/bench_lenet_step.py.",
        _table(head, lines),
    ])  # fmt: skip


def packed_linear(rows: list[Row]) -> str:
    """By number of rows of x: formats down, batches across; ratios to both dense lines."""
    batches = sorted({r["batch"] for r in rows})
    lines = []
    for layer in dict.fromkeys(r["layer"] for r in rows):
        time = {
            (r["contender"], r["density"], r["batch"]): r["min_us"]
            for r in rows
            if r["layer"] == layer
        }
        where = layer
        for contender, density in dict.fromkeys((c, d) for c, d, _ in time):
            for base in ("fp32", "bf16"):
                cells = []
                for m in batches:
                    mine = time.get((contender, density, m))
                    dense = time.get((f"F.linear {base}", 1.0, m))
                    if contender == f"F.linear {base}":
                        cells.append(f"{mine:.0f} µs" if mine else "")
                    else:
                        cells.append(f"{dense / mine:.2f}" if mine and dense else "")
                lines.append((where, contender, f"{density:g}", base, *cells))
                where = ""
    head = ("layer", "contender", "density", "ratio to", *(f"M = {m}" for m in batches))
    return "\n\n".join([
        "## Inference of a packed linear layer",
        "Ratio to `F.linear` in fp32 and in bf16, by rows M of x. Contenders: "
        "benchmarks/cpu/bench_packed_linear.py.",
        _table(head, lines),
    ])  # fmt: skip


def keep_top(rows: list[Row]) -> str:
    topk = {r["keep"]: r["min_us"] for r in rows if r["contender"] == "topk"}
    lines = []
    for r in rows:
        ratio = f"{topk[r['keep']] / r['min_us']:.1f}" if r["keep"] in topk else ""
        what = (r["scores"], r["keep"], r["threads"], r["contender"])
        lines.append((*what, f"{r['min_us'] / 1e3:.1f}", ratio))
    return "\n\n".join([
        f"## Selecting the top of {rows[0]['size']:,} scores as a mask",
        "Ratio to torch.topk(sorted=False) of abs(normal) scores, one thread, same share kept.",
        _table(("scores", "kept", "threads", "contender", "ms", "ratio"), lines),
    ])  # fmt: skip


TABLES = {
    "compact_linear": compact_linear,
    "compact_conv2d": compact_conv2d,
    "lenet_step": lenet_step,
    "packed_linear": packed_linear,
    "masked_linear": masked_linear,
    "keep_top": keep_top,
}
