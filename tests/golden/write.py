"""Writes golden files with the version of lottery_sparse that the working folder holds.

    PYTHONPATH=. python .../tests/golden/write.py tickets|models FOLDER NAME

Run in a checkout of an old commit; README.md says in which. Public names of that time are used
only, where there is no choice by `_name`. Beside each file lies what the old version made of it.
"""

import sys
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

import lottery_sparse as ls


def _name(old, new):
    """A name that lies at the top before the house, and in a namespace since."""
    return getattr(ls, old) if old in vars(ls) else getattr(getattr(ls, new), old)


Constant, Seeded, SignOf = (_name(name, "frozen") for name in ("Constant", "Seeded", "SignOf"))
use_masks_ = _name("use_masks_", "learning")


def numbers(*shape, at):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(20261124 + at))


def filled(model):
    with torch.no_grad():
        for at, parameter in enumerate(model.parameters()):
            parameter.copy_(0.1 * numbers(*parameter.shape, at=at))
    return model


def network():
    layers = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 10), nn.Linear(10, 6)
    return filled(nn.Sequential(*layers))


SHAPES = {"0.weight": (4, 1, 3, 3), "3.weight": (10, 16), "4.weight": (6, 10)}


def masks():
    return {name: numbers(*s, at=100 + i) > 0.3 for i, (name, s) in enumerate(SHAPES.items())}


def source(kind):
    tensors = {name: 0.01 * numbers(*shape, at=300) for name, shape in SHAPES.items()}
    sources = {"constant": Constant(0.25), "seeded": Seeded("normal", seed=3, std=0.2)}
    return tensors if kind == "tensor" else sources.get(kind, "zero")


def dense_of(model):
    return {n: t.clone() for n, t in ls.dense_state_dict(model).items()}


def save(path, tensors):
    safetensors.torch.save_file({n: t.detach().contiguous() for n, t in tensors.items()}, path)


def tickets(folder, name):
    start = {n: t.detach() for n, t in network().state_dict().items()}
    frozen = {n: 0.01 * numbers(*SHAPES[n], at=200) for n in ("0.weight", "3.weight")}
    history = [{"round": 0, "kept": 256, "metrics": {"accuracy": 0.5}}]
    drawn = {
        "3.weight": Seeded("normal", seed=7, std=0.1),
        "4.weight": SignOf(Seeded("uniform", seed=8, std=1.0), 0.05),
    }
    kinds = {
        name: ls.Ticket(ls.Masks(masks()), start, frozen, history),
        f"{name}-drawn": ls.Ticket(ls.Masks(masks()), start | drawn, {}, [], rescale=True),
    }
    applied = {}
    for kind, ticket in kinds.items():
        ticket.save(folder / f"{kind}.safetensors")
        model = ls.Ticket.load(folder / f"{kind}.safetensors").apply_(network())
        applied |= {f"{kind}.{n}": t for n, t in dense_of(model).items()}
    save(folder / f"{name}-applied.safetensors", applied)


def masked(kind):
    return ls.set_masks_(ls.sparsify_(network()), masks(), source(kind))


def supermask():
    model = ls.supermask_(network())
    with torch.no_grad():
        for at, (name, parameter) in enumerate(model.named_parameters()):
            if name.endswith("score"):
                parameter.copy_(numbers(*parameter.shape, at=500 + at))
    return use_masks_(model, "threshold").eval()


def packed():
    model = ls.sparsify_(
        filled(nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 40), nn.Linear(40, 8)))
    )
    drawn = {f"{i}.weight": numbers(*model[i].weight.shape, at=600 + i) > 1.3 for i in range(2)}
    with torch.no_grad():
        model[2].weight.sign_().mul_(0.25)
    ls.set_masks_(model, drawn | {"2.weight": numbers(8, 40, at=602) > -0.5})
    return ls.pack_(model)


def models(folder, name):
    made = {"supermask": supermask(), "packed": packed()}
    for kind in ("zero", "tensor", "constant", "seeded"):
        made[f"masked-{kind}"] = masked(kind)
        made[f"compact-{kind}"] = ls.compact_(masked(kind), spare=2)
    expected = {}
    for case, model in made.items():
        x = numbers(3, 64, at=400) if case == "packed" else numbers(3, 1, 4, 4, at=400)
        expected |= {f"{case}.x": x, f"{case}.y": model(x)}
        if case.startswith(("masked", "compact")):
            expected |= {f"{case}.{n}": t for n, t in dense_of(model).items()}
    torch.save(made, folder / f"{name}-models.pt")
    torch.save(
        {case: model.state_dict() for case, model in made.items()}, folder / f"{name}-states.pt"
    )
    values = {"masks": ls.Masks(masks()), "sources": [Seeded("normal", 7, 0.1), Constant(0.5)]}
    torch.save(values, folder / f"{name}-values.pt")
    save(folder / f"{name}-expected.safetensors", expected)


if __name__ == "__main__":
    what, folder, name = sys.argv[1:]
    Path(folder).mkdir(parents=True, exist_ok=True)
    {"tickets": tickets, "models": models}[what](Path(folder), name)
