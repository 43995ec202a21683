"""How runs were made, in words: their protocol, machines, versions and times."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments.findings.selection import Row, Selection
from experiments.show import overview
from experiments.study.runs import run_in


def told(selection: Selection, records: Sequence[Mapping[str, Any]]) -> Iterable[tuple[str, str]]:
    rows = [row for curve in selection.curves for row in curve.rows]
    network = run_in(selection.profile, selection.network, 0).net
    keep = ", ".join(f"{float(share):g} of {kind}" for kind, share in network.keep.items())
    yield "profile", selection.profile + (f": {selection.caveat}" if selection.caveat else "")
    if any(row["schedule"] == "learned" for row in rows):
        yield (
            "masks",
            f"SGD with momentum 0.9, rate {network.score_lr:g}, batch "
            f"{network.score_batch_size}, {network.score_iterations:,} iterations",
        )
    if any(row["schedule"] != "learned" for row in rows):
        yield (
            "training",
            f"Adam, rate {network.lr:g}, batch {network.batch_size}, "
            f"{network.iterations:,} iterations a round",
        )
        yield "a round keeps", keep
    yield "seeds", _list({row["seed"] for row in rows})
    rounds = {row["round"] for row in rows}
    yield "rounds", f"{min(rounds)} to {max(rounds)}" if len(rounds) > 1 else f"{min(rounds)}"
    yield "not run", ", ".join(selection.missing)
    yield "layers ran as", _products(rows)
    ids = overview.run_ids(selection)
    yield from _provenance([record for record in records if record.get("run_id") in ids])


def _products(rows: Sequence[Row]) -> str:
    """Which products the layers ran on: "rounds 8 to 20: sparse, sparse, dense"."""
    by_round: dict[int, Counter[str]] = {}
    for row in rows:
        if row.get("products"):
            by_round.setdefault(row["round"], Counter())[", ".join(row["products"])] += 1
    spans: list[tuple[int, int, str]] = []
    for number, counts in sorted(by_round.items()):
        told = " or ".join(products for products, _ in counts.most_common())
        if spans and spans[-1][2] == told:
            spans[-1] = (spans[-1][0], number, told)
        else:
            spans.append((number, number, told))
    return "; ".join(
        (f"round {first}" if first == last else f"rounds {first} to {last}") + f": {told}"
        for first, last, told in spans
    )


def _provenance(records: Sequence[Mapping[str, Any]]) -> Iterable[tuple[str, str]]:
    if not records:
        return
    yield "time", f"{overview.core_hours(records):.2f} core-hours"
    yield "started", _span(str(r["started"]) for r in records if r.get("started"))
    versions = {
        ", ".join(f"{name} {number}" for name, number in sorted(record["versions"].items()))
        for record in records
        if isinstance(record.get("versions"), Mapping)
    }
    yield "versions", _list(versions)
    yield (
        "commits",
        _list(
            {
                str(r["commit"] or "unknown")[:10] + (" with changes" if r.get("dirty") else "")
                for r in records
                if "commit" in r
            }
        ),
    )
    yield from machines(records)
    yield "engines", _list({str(r["engine"]) for r in records if r.get("engine")})
    outcomes = Counter(str(r.get("outcome", "done")) for r in records)
    yield "attempts", ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())


def machines(records: Sequence[Mapping[str, Any]]) -> Iterable[tuple[str, str]]:
    """Processors, instructions, compilers and systems; records before 2026-11-28 have none."""
    known = [r["machine"] for r in records if isinstance(r.get("machine"), Mapping)]
    kernels = [m["kernels"] for m in known if isinstance(m.get("kernels"), Mapping)]
    yield "processors", _list({m["cpu"] for m in known})
    yield "instructions", _list({" ".join(m["cpu_flags"]) for m in known if m.get("cpu_flags")})
    yield "kernels", _list({str(k.get("variant")) for k in kernels})
    yield "compilers", _list({str(k.get("compiler")) for k in kernels})
    yield "systems", _list({m["os"] for m in known if m.get("os")})
    done = [r for r in records if r.get("outcome") == "done"]
    unknown = sum("machine" not in r for r in done)
    if unknown:
        yield "machine unknown", f"of {unknown} of {len(done)} records, made before it was recorded"


def sources(records: Sequence[Mapping[str, Any]]) -> str:
    starts = _span(str(r["started"]) for r in records if r.get("started"))
    ran = f" Its runs were started {starts}." if starts else ""
    return f"Made by `python -m experiments report` from rows and records of the store.{ran}"


def _span(moments: Iterable[str]) -> str:
    ordered = sorted(moments)
    if not ordered:
        return ""
    return ordered[0] if ordered[0] == ordered[-1] else f"{ordered[0]} to {ordered[-1]}"


def _list(values: Iterable[Any]) -> str:
    return ", ".join(map(str, sorted(values)))
