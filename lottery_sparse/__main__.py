"""`python -m lottery_sparse doctor [--json]`, `… plan 784x300 --density 0.05`, `… ticket FILE` and
`… build`."""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from lottery_sparse.nn.forms.convert import set_masks_
from lottery_sparse.nn.masked import MaskedLinear
from lottery_sparse.planning.plan import plan
from lottery_sparse.text import shown
from lottery_sparse.tickets.ticket import Ticket
from lottery_sparse.tools import doctor


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lottery_sparse")
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser(
        "doctor",
        help="versions, kernels, which backend each op takes and why, and a self-check",
        description="Says what is installed and checks every backend against the reference. "
        "Exit status 0 if all that is installed works, 1 if not.",
    )
    show.add_argument("--json", action="store_true", help="the same as one JSON object")
    commands.add_parser(
        "build",
        help="build the kernels against the installed torch (in a checkout)",
        description="Builds csrc/ in place against the installed torch and says what came of it.",
    )
    measure = commands.add_parser(
        "plan",
        help="which form of a masked linear layer is fastest on this machine",
        description="Times one masked nn.Linear as ls.plan does, with a random mask.",
    )
    measure.add_argument("shape", type=_shape, help="inputs x outputs, such as 784x300")
    measure.add_argument("--batch", type=int, default=60)
    measure.add_argument("--density", type=float, nargs="+", default=[0.5, 0.2, 0.1, 0.05, 0.02])
    measure.add_argument("--threads", type=int, help="default: as torch chooses")
    measure.add_argument("--inference", action="store_true", help="forward only")
    read = commands.add_parser(
        "ticket",
        help="what a ticket file holds, and whether it is what was saved",
        description="Shows masks, starts, size and history of a file that ls.Ticket.save wrote, "
        "and verifies it. Exit status 0 if all is as it was saved, 1 if not.",
    )
    read.add_argument("file", type=Path)
    arguments = parser.parse_args(argv)
    if arguments.command == "ticket":
        return _ticket(arguments.file)
    if arguments.command == "plan":
        for density in arguments.density:
            if not 0 <= density <= 1:
                measure.error(f"--density is a fraction in [0, 1], got {density:g}")
        return _plan(arguments)
    return _doctor(arguments.json) if arguments.command == "doctor" else _build()


def _shape(text: str) -> tuple[int, int]:
    sizes = text.split("x")
    if len(sizes) != 2 or not all(size.isdigit() and int(size) for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r} is not inputs x outputs, such as 784x300")
    return int(sizes[0]), int(sizes[1])


def _plan(arguments: argparse.Namespace) -> int:
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    generator = torch.Generator().manual_seed(0)
    inputs, outputs = arguments.shape
    layers = nn.ModuleDict()
    for density in arguments.density:
        layer = MaskedLinear(inputs, outputs)
        mask = torch.rand(outputs, inputs, generator=generator) < density
        layers[str(len(layers))] = set_masks_(layer, {"weight": mask})
    x = torch.rand(arguments.batch, inputs, generator=generator)
    plan(_Each(layers), x, training=not arguments.inference, apply=False)
    return 0


class _Each(nn.Module):
    """Gives one input to many layers."""

    def __init__(self, layers: nn.ModuleDict):
        super().__init__()
        self.layers = layers

    def forward(self, x: torch.Tensor) -> None:
        for layer in self.layers.values():
            layer(x)


def _ticket(path: Path) -> int:
    try:
        ticket = Ticket.load(path)
        print(_as_text(ticket))
        ticket.verify()
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{error.strerror}: {shown(str(path), most=4096)}", file=sys.stderr)
        return 1
    if ticket.saved is None:
        print("not verified: the file is of a time when tickets had no digests")
    else:
        print("verified: masks, tensors and what its seeds draw here are as they were saved")
    return 0


def _as_text(ticket: Ticket) -> str:
    """Masks, starts, size and history of a ticket, for people."""
    lines = [ticket.masks.table(), ""]
    for name, start in ticket.start.items():
        what = "a tensor" if isinstance(start, torch.Tensor) else repr(start)
        held = ""
        if name in ticket.masks:
            held = "a tensor" if name in ticket.frozen else "zero"
            held = ", pruned ones train too" if ticket.released else f", pruned ones hold {held}"
        lines.append(f"{shown(name)} starts from {shown(what)}{held}")
    if ticket.rescale:
        lines.append("drawn weights are multiplied by weights / kept")
    sizes = ", ".join(f"{name} {-(-bits // 8):,}" for name, bits in ticket.bits.items())
    lines += ["", f"bytes: {sizes}"]
    for record in ticket.history:
        names = sorted(record, key=lambda name: (name != "round", name))
        words = (f"{shown(name)} {shown(json.dumps(record[name]))}" for name in names)
        lines.append(", ".join(words))
    return "\n".join(lines)


def _doctor(as_json: bool) -> int:
    # the report itself says that kernels are missing; the first op need not say it too
    logging.getLogger("lottery_sparse").setLevel(logging.ERROR)
    found = doctor.report()
    print(json.dumps(found, indent=2) if as_json else doctor.as_text(found))
    return 0 if found["healthy"] else 1


def _build() -> int:
    root = Path(__file__).resolve().parent.parent
    if not (root / "setup.py").is_file() or not (root / "csrc").is_dir():
        print(
            "There are no kernel sources beside this installed package; in a checkout, or an "
            "unpacked source distribution, run `pip install --no-build-isolation .` instead.",
            file=sys.stderr,
        )
        return 1
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    environment = os.environ | {"LS_BUILD": "require"}
    status = subprocess.run(command, cwd=root, env=environment).returncode
    if status:
        print("The kernels were not built; the compiler's messages are above.", file=sys.stderr)
        return 1
    # a fresh interpreter, since this one has looked for the old files already
    say = "from lottery_sparse.tools import doctor; print(doctor.native_line())"
    return subprocess.run([sys.executable, "-c", say], cwd=root).returncode


if __name__ == "__main__":
    sys.exit(main())
