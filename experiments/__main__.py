"""Command line: python -m experiments list, quickstart, run, status, figure, table or report."""

import argparse
import importlib.util
import json
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lottery_sparse as ls
from experiments.files import make_folder, write_whole
from experiments.show.numbering import figures_of, studies_of
from experiments.show.rows import rows
from experiments.store.provenance import provenance
from experiments.store.remakes import readable
from experiments.store.store import Store
from experiments.study import studies
from experiments.study.networks import NETWORKS, find
from experiments.study.profiles import PROFILES
from experiments.study.runs import LITERALS
from experiments.sweep.engines import ENGINES
from experiments.sweep.progress import INSTALL, warning_line
from experiments.sweep.status import Times, as_text, progress, together
from experiments.sweep.sweep import run_study
from experiments.tools import quickstart, speed, step_speed, tune
from experiments.train import data

STORE = Path("out/experiments")
SHOWS = {  # what shows results: where it writes by default, and its help
    "figure": (Path("out/figures"), "figures of what the store holds, with their numbers as CSV"),
    "table": (None, "tables of what the store holds"),
    "claims": (None, "what the rows say to each claim, as Markdown"),
    "report": (Path("out/report.html"), "one page with all figures, tables and verdicts"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit status. Errors of the user are one message, no traceback."""
    options = parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():  # which ends what is changed here
            warnings.showwarning = warning_line
            status = options.command(options)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough: `list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:  # DataError is a ValueError
        print(f"error: {_in_words(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        again = "; the same command goes on with what is not done" if options.resumes else ""
        print(f"interrupted{again}", file=sys.stderr)
        return 130
    return status or 0


def _in_words(error: ValueError | OSError) -> str:
    """Its sentence, without Python's "[Errno 13]"."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    if error.filename is None:
        return f"{error.strerror}."
    return f"{error.filename} cannot be read or written ({error.strerror}): give another place."


# ---- options -------------------------------------------------------------------------------------

SEE = "see `list`"
DEFAULT = "(default: %(default)s)"


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m experiments")
    top.set_defaults(resumes=False)
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str, *options: Any) -> Any:
        """A command; returns what adds an option to it."""
        made = commands.add_parser(name, help=text)
        made.set_defaults(command=run)
        for add in options:
            add(made.add_argument)
        return made.add_argument

    command("list", list_all, "networks, data sets, criteria, actions; studies and their figures")

    add = command(
        "quickstart", run_quickstart, "tickets, supermasks and times on LeNet, in under a minute",
        _data, _json, _seed,
    )  # fmt: skip
    count, out = quickstart.ITERATIONS, Path("out/quickstart.png")
    add("--iterations", type=int, default=count, help=f"per training run {DEFAULT}")
    add("--png", type=Path, metavar="FILE", default=out, help=f"where to draw {DEFAULT}")

    text = "do what is still to do of a study; resumes"
    add = command("run", run, text, _store, _data, _parts, _workers_option)
    commands.choices["run"].set_defaults(resumes=True, network="fc")
    add("study", nargs="?", metavar="STUDY", help=SEE)
    numbers = "7 of the paper, article-7 of the article"
    add("--figure", metavar="NUMBER", help=f"instead of STUDY: all studies of a figure, {numbers}")
    add("--profile", choices=PROFILES, default="paper", help="how much of it (default: paper)")
    add("--seeds", type=int, metavar="N", help="default: the study's")
    add("--rounds", type=int, metavar="N", help="default: the study's")
    text = "only runs with this value, such as criterion=movement; may be repeated"
    add("--only", action="append", default=[], metavar="FIELD=VALUE", help=text)
    add("--engine", choices=ENGINES, default="process", help="default: %(default)s")
    add("--scheduler", metavar="ADDRESS", help="of a Dask cluster")
    add("--devices", default="cpu", metavar="LIST", help=f"cpu, or cuda:0,cuda:1 {DEFAULT}")
    text = "make anew, as wholes, chains that cannot go on here: their weights are lost, or of "
    text += "another machine, or gave other numbers"
    add("--remake", action="store_true", help=text)
    text = "how the CPU kernels of the runs sum: 1, -1 portable code, 0 not built (default: 1)"
    add("--numerics", type=int, default=1, choices=LITERALS["numerics"], help=text)

    text = "what a chain costs beside eager PyTorch; steps of conv nets; 5 minutes each"
    add = command("speed", run_speed, text, _data, _json)
    text = "fc: a chain; conv2 conv4 conv6: a step and an evaluation in each precision, layout "
    text += "and form (default: fc)"
    add("--network", nargs="+", default=["fc"], metavar="NAME", help=text)

    text = "learning rates of learned masks, by validation data"
    add = command("tune", run_tune, text, _data, _json, _seed)
    add("--network", default="conv2", help=f"{SEE} {DEFAULT}")
    text = "of SGD on the scores (default: 10 30 100 300)"
    add("--rates", type=float, nargs="+", default=tune.RATES, help=text)
    add("--iterations", type=int, required=True, help="of each rate")

    add = command("compare", run_compare, "what two profiles say of the same runs and seeds")
    add("profiles", nargs=2, metavar="PROFILE", help="see `run --help`")
    add("--network", metavar="NAME", help=f"{SEE} (default: all)")
    text = f"folders of results, together {DEFAULT}"
    add("--store", type=Path, nargs="+", default=[STORE], metavar="DIR", help=text)

    text = "what is done, who is on the rest, hours left"
    add = command("status", status, text, _chosen, _workers_option)
    add("--seeds", type=int, metavar="N", help="default: the study's")
    text = "only the ids of runs to do, one per line"
    add("--pending", action="store_true", help=text)

    for name, (out, text) in SHOWS.items():
        add = command(name, partial(show, name), text, _chosen)
        text = "where to write" + (f" {DEFAULT}" if out else " files, too")
        add("--out", type=Path, default=out, metavar="FOLDER", help=text)

    add = command("rows", rows, "the rows that the store holds, for any table tool", _chosen)
    add("--csv", type=Path, metavar="FILE", help="write it (default: CSV to standard output)")
    add("--parquet", type=Path, metavar="FILE", help="write it; needs pyarrow")

    text = "the picture of README.md: accuracy and time of a step over density"
    add = command("overview", overview, text, _store)
    out = SHOWS["figure"][0]
    add("--out", type=Path, default=out, metavar="FOLDER", help=f"where to write {DEFAULT}")
    return top


def _chosen(add: Any) -> None:
    add("study", nargs="?", metavar="STUDY", help=f"{SEE} (default: all)")
    text = "of the runs (default: those that decide claims, paper and coarse; for status, and "
    text += "where there are no rows of them, the one that the store has rows of)"
    add("--profile", choices=PROFILES, help=text)
    _parts(add)
    _store(add)


def _parts(add: Any) -> None:
    text = f"{SEE}, or MODULE:ATTR of your own (default of run: fc; else all)"
    add("--network", metavar="NAME", help=text)
    text = "in place of the network's: see `list`, or MODULE:ATTR of your own"
    add("--dataset", default="", metavar="NAME", help=text)
    text = "in place of the study's, where arms have one: see `list`, or MODULE:FUNCTION"
    add("--criterion", nargs="+", default=(), metavar="NAME", help=text)


def _store(add: Any) -> None:
    text = f"folder of the results {DEFAULT}"
    add("--store", type=Path, default=STORE, metavar="DIR", help=text)


def _data(add: Any) -> None:
    text = f"folder that holds {', '.join(data.FOLDERS.values())} (default: LS_DATA_DIR)"
    add("--data-dir", type=Path, help=text.replace("DIR/", ""))
    add("--download", action="store_true", help="fetch what is missing in it")


def _json(add: Any) -> None:
    add("--json", type=Path, metavar="FILE", help="write the numbers")


def _seed(add: Any) -> None:
    add("--seed", type=int, default=0)


def _workers_option(add: Any) -> None:
    text = "processes; status divides the hours by it (default: one per core)"
    add("--workers", type=int, metavar="N", help=text)


# ---- commands ------------------------------------------------------------------------------------


def list_all(options: argparse.Namespace) -> None:
    print("networks")
    for network in NETWORKS.values():
        keep = ", ".join(f"{kind} {float(share):g}" for kind, share in network.keep.items())
        print(
            f"  {network.name:<8}{network.dataset}, Adam {network.lr:g}, batch "
            f"{network.batch_size}, {network.iterations:,} iterations a round, keeps {keep}"
        )
    print("studies")
    for study in studies.STUDIES.values():
        where = figures_of(study.name) or study.figure
        print(f"  {study.name:<20}{study.question}\n{'':<22}{where}; {', '.join(study.networks)}")
    print("data sets")
    for name, text in data.DATASETS.items():
        print(f"  {name:<15}{text}")
    for title, table in (
        ("mask criteria", ls.pruning.CRITERIA),
        ("mask-1 actions, on kept weights", ls.pruning.MASK1_ACTIONS),
        ("mask-0 actions, on pruned weights", ls.pruning.MASK0_ACTIONS),
    ):
        print(title)
        for name, function in table.items():
            print(f"  {name:<34}{(function.__doc__ or '').strip().splitlines()[0]}")


def run_quickstart(options: argparse.Namespace) -> None:
    _check_places(options.json, options.png)
    if options.data_dir or options.download or data.has_mnist(None):
        dataset = data.load("mnist", options.data_dir, download=options.download)
    else:
        dataset = data.load("mnist-mini")
        print("full MNIST was not found (--data-dir, LS_DATA_DIR): using the mnist-mini subset")
    numbers = quickstart.quickstart(dataset, options.seed, options.iterations)
    print(f"\nall in {numbers['seconds']:.0f} s")
    if options.json:
        _write(options.json, numbers)
        print(f"numbers: {options.json}")
    if importlib.util.find_spec("matplotlib") is None:
        print(f"no figure: matplotlib is not installed ({INSTALL})")
        return
    from experiments.show.figures.quickstart import quickstart as draw

    write_whole(options.png, draw(numbers))
    print(f"figure: {options.png}")


def run(options: argparse.Namespace) -> int:
    pairs = [tuple(text.split("=", 1)) for text in options.only]
    if bad := [text for text, pair in zip(options.only, pairs, strict=True) if len(pair) != 2]:
        raise ValueError(f"--only takes FIELD=VALUE, got {bad[0]!r}.")
    if (options.study is None) == (options.figure is None):
        raise ValueError("run takes a STUDY or a --figure, one of both; `list` shows them.")
    names = (options.study,) if options.figure is None else studies_of(options.figure)
    failed = 0
    for study in [studies.asked(name, options) for name in names]:
        failed += run_study(
            study,
            options.network,
            options.profile,
            studies.seeds_asked(study, options.profile) if options.seeds is None else options.seeds,
            options.store,
            rounds=options.rounds,
            only=pairs,
            data_dir=options.data_dir,
            download=options.download,
            engine=options.engine,
            workers=_workers(options),
            scheduler=options.scheduler,
            devices=options.devices.split(","),
            numerics=options.numerics,
            remake=options.remake,
        )
    if failed:
        text = "1 group was" if failed == 1 else f"{failed} groups were"
        print(f"{text} not done; the same command goes on with what is left", file=sys.stderr)
    return 1 if failed else 0


def _workers(options: argparse.Namespace) -> int:
    return (os.cpu_count() or 1) if options.workers is None else options.workers


def _check_places(*files: Path | None) -> None:
    """What is to be written can be: asked before the minutes that its numbers take."""
    for path in files:
        if path is not None:
            make_folder(path.parent)


def _write(path: Path | None, numbers: Mapping[str, Any]) -> None:
    if path is not None:
        write_whole(path, json.dumps(numbers, indent=1).encode() + b"\n")


def run_speed(options: argparse.Namespace) -> None:
    _check_places(options.json)
    if options.network != ["fc"]:
        _step_speed(options)
        return
    numbers = speed.measure(data.load("mnist", options.data_dir, download=options.download))
    for row in numbers["rounds"]:
        times = ", ".join(f"{name} {row[name]:.2f} s" for name in numbers["seconds"])
        print(f"round {row['round']:2}  density {row['density']:7.2%}  {times}")
    print(", ".join(f"{over:.1f}x of {name}" for name, over in numbers["speedup"].items()))
    _write(options.json, numbers)


def _step_speed(options: argparse.Namespace) -> None:
    known = [name for name, network in NETWORKS.items() if network.convolutions]
    if bad := [name for name in options.network if name not in known]:
        raise ValueError(f"network must be fc alone, or of {', '.join(known)}; got {bad[0]!r}.")
    print(step_speed.HEAD)
    found = []
    for row in step_speed.measure(options.network):
        print(step_speed.lines(row), flush=True)
        found.append(row)
        about = {"threads": 1, "unit": "CPU seconds", "images": step_speed.IMAGES}
        # after each, so that what was measured is not lost
        _write(options.json, {**about, "rows": found, **provenance()})


def run_compare(options: argparse.Namespace) -> None:
    _check_shows("compare")
    from experiments.show.compare import compare  # it loads scipy

    found = [row for folder in options.store for row in Store(folder, create=False).rows()]
    profile, other = options.profiles
    print(compare(found, profile, other, options.network).text(), end="")


def run_tune(options: argparse.Namespace) -> None:
    _check_places(options.json)
    name = find(options.network).dataset
    dataset = data.load(name, options.data_dir, download=options.download)
    found = []
    for row in tune.tune(options.network, dataset, options.rates, options.iterations, options.seed):
        print(
            f"rate {row['rate']:g}  iteration {row['iteration']:,}  validation loss "
            f"{row['validation_loss']:.4f}, accuracy {row['validation_accuracy']:.2%}"
        )
        found.append(row)
        _write(options.json, {"rows": found, "seed": options.seed, **provenance()})


def only_profile(store: Store) -> str:
    """The profile of all rows of a store; the paper's if they are of several, or there are none."""
    found = {row["profile"] for row in store.rows()}
    return found.pop() if len(found) == 1 else "paper"


def status(options: argparse.Namespace) -> None:
    chosen = studies.chosen(options)
    networks = [find(options.network).name] if options.network else list(NETWORKS)
    if options.seeds is not None and options.seeds < 1:
        raise ValueError(f"seeds must be 1 or more, got {options.seeds}.")
    store = Store(options.store, create=False)
    found = progress(chosen, networks, options.profile or only_profile(store), options.seeds, store)
    if not found:
        raise ValueError(f"{options.study} is not a study of {options.network}.")
    if options.pending:
        for run_id in dict.fromkeys(run.id for run in together(found).pending):
            print(run_id)
        return
    workers = _workers(options)
    if workers < 1:
        raise ValueError(f"workers must be 1 or more, got {workers}.")
    print(as_text(found, Times(store.rows(), store.records()), workers))


def _check_shows(name: str) -> None:
    if any(importlib.util.find_spec(needed) is None for needed in ("matplotlib", "scipy")):
        raise ValueError(f"{name} needs matplotlib and scipy, which are not here: {INSTALL}.")


def overview(options: argparse.Namespace) -> None:
    _check_shows("overview")
    from experiments.findings.selection import select
    from experiments.show.figures.overview import overview as draw  # matplotlib loads slowly

    speeds = json.loads((options.store / "speed.json").read_text("utf-8"))
    found = readable(Store(options.store, create=False).rows())
    selection = select(studies.find("mask-criteria"), "fc", "paper", found)
    for path in draw(selection, speeds).save(options.out, "overview"):
        print(path)


def show(name: str, options: argparse.Namespace) -> None:
    _check_shows(name)
    from experiments.show import commands as shows

    getattr(shows, name)(options)


if __name__ == "__main__":
    sys.exit(main())
