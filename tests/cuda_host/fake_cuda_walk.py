"""What test_fake_cuda.py runs on the fake device: tiny chains, learned masks, the package."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from tolerances import close
from torch import Tensor, nn

import lottery_sparse as ls
from benchmarks.gpu import gate as gpu_gate
from benchmarks.gpu.timing import Device
from experiments.store.store import OtherNumbers, Store
from experiments.study.networks import FC, NETWORKS
from experiments.study.runs import DENSE, Run
from experiments.sweep.execute import execute
from experiments.train import data
from experiments.train import loop as train
from lottery_sparse.ops import dispatch
from lottery_sparse.ops.steps import tables

torch.set_num_threads(1)
CUDA = torch.device("cuda:0")
SMOKE = partial(Run, network="fc", profile="smoke")
NETWORKS["fc"] = replace(FC, iterations=4_000, score_iterations=3_000)  # smoke: a thousandth


def refused(call, kind: type[Exception] = RuntimeError) -> None:
    try:
        call()
    except kind:
        return
    raise AssertionError("the fake device takes what CUDA refuses")


def the_device_is_like_one() -> None:
    a, b = torch.randn(3, 4, device=CUDA), torch.randn(3, 4)
    for call in (
        lambda: a + b, lambda: b.add_(a), lambda: torch.where(a > 0, a, b),
        lambda: a.index_select(0, torch.tensor([0])), lambda: torch.equal(a, b),
        lambda: b[torch.tensor([0], device=CUDA)], lambda: torch.cat([a, b]),
        lambda: torch.rand(3, device=CUDA, generator=torch.Generator()),
    ):  # fmt: skip
        refused(call)
    refused(a.numpy, TypeError)
    assert torch.equal((a * 2)[torch.tensor([1])].cpu(), a.cpu()[1:2] * 2)


def first(dataset: data.Dataset) -> data.Dataset:
    def cut(part: data.Split, count: int) -> data.Split:
        return data.Split(part.images[:count], part.labels[:count])

    return replace(
        dataset, train=cut(dataset.train, 600), val=cut(dataset.val, 50), test=cut(dataset.test, 50)
    )


def do(folder: Path, runs: list[Run], rounds: int, dataset: data.Dataset) -> list[dict]:
    store = Store(folder)
    with store.claim([run.id for run in runs]) as lease:
        execute(runs, rounds, store, lease, dataset, lambda text: None)
    return Store(folder).rows()


def experiments(folder: Path) -> None:
    sets = {name: first(data.load("mnist-mini", device=name)) for name in ("cpu", "cuda:0")}
    found: dict[str, list[dict]] = {}
    dense = [SMOKE(seed=seed, criterion=DENSE) for seed in (0, 1)]
    chains = [SMOKE(seed=0, criterion="random"), SMOKE(seed=1, mask1="signed_constant")]
    frozen = [SMOKE(seed=0, mask0="freeze_init")]
    shot = [SMOKE(seed=0, schedule="one_shot", trained=False)]
    learned = [SMOKE(seed=0, schedule="learned", criterion=DENSE, trained=True, rescale=True)]
    for name, dataset in sets.items():
        for runs in (dense, chains, frozen, shot, learned):
            found[name] = do(folder / name[:4], runs, 2, dataset)
    for cpu, cuda in zip(*found.values(), strict=True):
        assert (cuda["run_id"], cuda["round"]) == (cpu["run_id"], cpu["round"])
        # no kernel of Triton starts here, and a row says what has run
        assert (cuda["backend"], set(cuda["products"])) == ("reference", {"dense"}), cuda
        assert abs(cuda["test_accuracy"] - cpu["test_accuracy"]) <= 0.1
        if cuda["schedule"] != "learned":
            assert cuda["kept"] == cpu["kept"]
    # without checkpoints, which are not committed, rounds are done again and compared
    shutil.rmtree(folder / "cuda" / "checkpoints")
    rows = folder / "cuda" / "rows.jsonl"
    before = rows.read_bytes()
    for runs in (dense, chains):
        do(folder / "cuda", runs, 2, sets["cuda:0"])
    assert rows.read_bytes() == before
    shutil.rmtree(folder / "cuda" / "checkpoints")
    train.EPS = 1e-3  # another card ends otherwise
    try:
        do(folder / "cuda", dense, 2, sets["cuda:0"])
    except OtherNumbers:
        pass
    else:
        raise AssertionError("a chain went on with other numbers than those of its rows")
    assert rows.read_bytes() == before


def small(conv: bool) -> nn.Sequential:
    torch.manual_seed(0)
    head = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten()] if conv else [nn.Flatten()]
    return nn.Sequential(*head, nn.Linear(144 if conv else 64, 5)).cuda()


def package(folder: Path) -> None:
    x = torch.randn(6, 1, 8, 8, device=CUDA)
    for conv in (False, True):
        models = []
        for seed in range(2):
            model = ls.sparsify_(small(conv))
            ls.set_masks_(model, {
                name: torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed)) < 0.4
                for name, mask in ls.masks_of(model).items()
            }, frozen=dict.fromkeys(ls.masks_of(model), ls.frozen.Constant(0.5)))  # fmt: skip
            models.append(ls.compact_(model))
        both = ls.ensemble.replicate(models)
        close(both(x), torch.stack([m(x) for m in models]))
        for model in (*models, both):
            optimizer = ls.optim.Adam(model.parameters(), fused=True)
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
        ls.nn.refresh_(ls.ensemble.select(both, 1))
        model = ls.sparsify_(small(conv))
        model.load_state_dict({k: v.cpu() for k, v in models[0].state_dict().items()})
        close(model(x), models[0](x))
        ls.pack_(models[0], report=None)(x)
        ls.channels.drop_channels(ls.sparsify_(small(conv)), x)
        model = ls.supermask_(small(conv), seed=3)
        model(x).sum().backward()
        ticket = ls.Ticket.of(ls.learning.use_masks_(model, 0))
        ticket.save(folder / "ticket")
        again = ls.Ticket.load(folder / "ticket").apply_(small(conv))
        assert next(again.parameters()).device == CUDA


def cases_of_the_gate() -> None:
    """Which are the doctor's: all of an op happens on the device, what it draws as well."""
    device = Device(dry=False)
    for name, (op, make) in gpu_gate.small().items():
        found = dispatch.run_on("reference", op, *make(device))
        results = found if isinstance(found, list | tuple) else [found]
        places = {str(t.device) for t in results if isinstance(t, Tensor)}
        assert places == {"cuda:0"} or op == "scatter_kept_", (name, places)
        if gpu_gate.offers("dense", op, "cuda"):
            row = gpu_gate.parity(op, "dense", make, "fp32", device)
            assert row["ok"], (name, row)


def tables_of_captured_steps() -> None:
    """A capture pins no memory and waits for nothing; its tables end with it, however many."""
    params = [nn.Parameter(torch.randn(size, device=CUDA)) for size in (70, 5, 3000)]
    tensors = params, [torch.randn_like(p) for p in params]
    steps = [torch.zeros((), device=CUDA) for _ in params]
    nowhere = tables.Targets([], [], [], [])
    eager = tables.table_of(tensors, steps, nowhere)
    held = len(tables._tables)
    pinned = mock.Mock(side_effect=RuntimeError("not permitted when stream is capturing"))
    with (
        mock.patch("torch.cuda.is_current_stream_capturing", return_value=True),
        mock.patch.object(Tensor, "pin_memory", pinned),
    ):
        captured = [tables.table_of(tensors, steps, nowhere) for _ in range(40)]
    assert all(torch.equal(table.numbers, eager.numbers) for table in captured)
    assert {(t.parts, t.targets, t.steps, t.chunks) for t in (eager, *captured)} == {
        (eager.parts, eager.targets, eager.steps, eager.chunks)
    }
    left = [weakref.ref(table.numbers) for table in captured]
    del captured
    assert not any(number() is not None for number in left)
    assert len(tables._tables) == held


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        the_device_is_like_one()
        cases_of_the_gate()
        tables_of_captured_steps()
        package(Path(name))
        experiments(Path(name))
    print("walked")
