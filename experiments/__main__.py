"""Command line of the experiments: python -m experiments list | quickstart | run."""

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import torch

import lottery_sparse as ls
from experiments import data, quickstart
from experiments.files import write_whole
from experiments.lottery import Run, lottery
from experiments.networks import NETWORKS
from experiments.progress import INSTALL, Progress


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit status. Errors of the user are one message, no traceback."""
    options = parser().parse_args(arguments)
    try:
        options.command(options)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough: `list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:  # DataError is a ValueError
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m experiments")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("list", help="networks, data sets, criteria, actions")
    command.set_defaults(command=list_all)

    command = commands.add_parser(
        "quickstart", help="tickets, supermasks and times on LeNet, in under a minute"
    )
    command.set_defaults(command=run_quickstart)
    _data_options(command)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument(
        "--iterations",
        type=int,
        default=quickstart.ITERATIONS,
        help="per training run (default: %(default)s)",
    )
    command.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")
    command.add_argument(
        "--png",
        type=Path,
        metavar="FILE",
        default=Path("out/quickstart.png"),
        help="where to draw (default: %(default)s)",
    )

    command = commands.add_parser("run", help="one lottery run, by default the paper's protocol")
    command.set_defaults(command=run_lottery)
    command.add_argument("--network", choices=NETWORKS, default="lenet")
    command.add_argument("--criterion", choices=ls.CRITERIA, default="large_final")
    command.add_argument("--mask1", choices=ls.MASK1_ACTIONS, default="rewind")
    command.add_argument("--mask0", choices=ls.MASK0_ACTIONS, default="zero")
    command.add_argument("--rounds", type=int, default=24, help="pruned rounds (default: 24)")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--iterations", type=int, help="per round (default: the network's)")
    command.add_argument(
        "--keep", type=Fraction, help="share of each layer kept per round, 0 to 1 (e.g. 0.8)"
    )
    command.add_argument("--scope", choices=("layer", "global"), default="layer")
    command.add_argument("--one-shot", action="store_true", help="prune the dense network at once")
    command.add_argument("--rewind-to", type=int, default=0, metavar="ITERATION")
    command.add_argument(
        "--compounding", action="store_true", help="mask-1 actions act on the last round's start"
    )
    command.add_argument(
        "--dataset", choices=data.DATASETS, help="default: the network's; mnist-mini is a subset"
    )
    _data_options(command)
    command.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    command.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    command.add_argument("--out", type=Path, metavar="FILE.jsonl", help="append a line per round")
    return top


def _data_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--data-dir",
        type=Path,
        help="folder that holds MNIST/raw, cifar-10-batches-bin (default: LS_DATA_DIR)",
    )
    command.add_argument("--download", action="store_true", help="fetch what is missing in it")


def list_all(options: argparse.Namespace) -> None:
    print("networks")
    for network in NETWORKS.values():
        keep = ", ".join(f"{kind} {float(share):g}" for kind, share in network.keep.items())
        print(
            f"  {network.name:<8}{network.dataset}, Adam {network.lr:g}, batch "
            f"{network.batch_size}, {network.iterations:,} iterations a round, keeps {keep}"
        )
    print("data sets")
    for name, text in data.DATASETS.items():
        print(f"  {name:<12}{text}")
    for title, table in (
        ("mask criteria (--criterion)", ls.CRITERIA),
        ("mask-1 actions, on kept weights (--mask1)", ls.MASK1_ACTIONS),
        ("mask-0 actions, on pruned weights (--mask0)", ls.MASK0_ACTIONS),
    ):
        print(title)
        for name, function in table.items():
            print(f"  {name:<34}{(function.__doc__ or '').strip().splitlines()[0]}")


def run_quickstart(options: argparse.Namespace) -> None:
    if options.data_dir or options.download or data.has_mnist(None):
        dataset = data.load("mnist", options.data_dir, download=options.download)
    else:
        dataset = data.load("mnist-mini")
        print("full MNIST was not found (--data-dir, LS_DATA_DIR): using the mnist-mini subset")
    numbers = quickstart.quickstart(dataset, options.seed, options.iterations)
    print(f"\nall in {numbers['seconds']:.0f} s")
    if options.json:
        write_whole(options.json, json.dumps(numbers, indent=1).encode() + b"\n")
        print(f"numbers: {options.json}")
    if importlib.util.find_spec("matplotlib") is None:
        print(f"no figure: matplotlib is not installed ({INSTALL})")
        return
    from experiments.figures.quickstart import quickstart as draw

    write_whole(options.png, draw(numbers))
    print(f"figure: {options.png}")


def run_lottery(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    network = NETWORKS[options.network]
    if options.iterations is not None:
        network = replace(network, iterations=options.iterations)
    if options.keep is not None:
        network = replace(network, keep=dict.fromkeys(network.keep, options.keep))
    run = Run(
        network,
        options.criterion,
        options.mask1,
        options.mask0,
        options.rounds,
        options.seed,
        options.scope,
        options.one_shot,
        options.rewind_to,
        options.compounding,
    )
    name = options.dataset or network.dataset
    dataset = data.load(name, options.data_dir, options.device, options.download)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
    with Progress(total=network.iterations * (run.rounds + 1)) as progress:

        def on_step(number: int, iteration: int) -> None:
            progress.advance()

        for this in lottery(run, dataset, on_step):
            row = this.row
            if options.out:
                with options.out.open("a") as file:  # closed, so flushed, after each line
                    file.write(json.dumps(row) + "\n")
            progress.line(
                f"round {row['round']:2}  density {row['density']:7.2%}  test accuracy "
                f"{row['test_accuracy']:.2%} at iteration {row['early_stop_iteration']:,}, "
                f"final {row['final_test_accuracy']:.2%}  ({row['seconds']:.0f} s)"
            )


if __name__ == "__main__":
    sys.exit(main())
