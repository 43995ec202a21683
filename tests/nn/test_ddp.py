"""Layers under torch.nn.parallel.DistributedDataParallel with its default arguments."""

from __future__ import annotations

import pytest
import torch
from masked_layers import SOURCES
from tolerances import USUAL, close
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import lottery_sparse as ls

WEIGHTS = (0, 4, 6, 8)
OPTIMIZERS = {
    "ls-adam": lambda parameters: ls.optim.Adam(parameters, lr=0.01, eps=1e-3),
    "torch-sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
}
CASES = [
    ("masked", "zero", "torch-sgd"),
    ("masked", "constant", "ls-adam"),
    *(("compact", source, name) for source in SOURCES for name in OPTIMIZERS),
]


def model_of(kind, frozen, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 30),
        nn.ReLU(),
        nn.Linear(30, 10),
        nn.ReLU(),
        nn.Linear(10, 5),
    )
    ls.sparsify_(model)
    masks = {}
    for name, mask in ls.masks_of(model).items():  # for all seeds as many kept
        masks[name] = (torch.randperm(mask.numel()) < 0.3 * mask.numel()).view(mask.shape)
    ls.set_masks_(model, masks, source_of(model, frozen))
    return ls.compact_(model) if kind == "compact" else model


def source_of(model, frozen):
    source = SOURCES[frozen]
    if not callable(source):
        return source
    return {f"{i}.weight": source(model[i].effective_weight.detach()) for i in WEIGHTS}


def train(model, called, frozen, optimizer, rank=None):
    """Five steps with other masks after the second, on all rows or on those of a rank."""
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    rows = torch.Generator().manual_seed(2)
    for step in range(5):
        x = torch.randn(8, 1, 8, 8, generator=rows)
        y = torch.randint(5, (8,), generator=rows)
        if rank is not None:
            x, y = x.chunk(2)[rank], y.chunk(2)[rank]
        optimizer.zero_grad()
        nn.functional.cross_entropy(called(x), y).backward()
        optimizer.step()
        if step == 1:
            masks = {n: m.flatten().roll(1).view(m.shape) for n, m in ls.masks_of(model).items()}
            torch.manual_seed(3)
            ls.set_masks_(model, masks, source_of(model, frozen), optimizer=optimizer)
    return ls.dense_state_dict(model)


def one_of_two(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    trained = []
    for kind, frozen, optimizer in CASES:
        model = model_of(kind, frozen, seed=rank)  # the other rank's weights and masks are others
        trained.append(train(model, DistributedDataParallel(model), frozen, optimizer, rank))
    torch.save(trained, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not distributed.is_available(), reason="torch without distributed")
def test_two_ranks_train_like_one_process_with_all_rows(tmp_path):
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for case, first, second in zip(CASES, *ranks, strict=True):
        model = model_of(case[0], case[1], seed=0)
        start = {n: v.clone() for n, v in ls.dense_state_dict(model).items()}
        expected = train(model, model, *case[1:])
        for name, wanted in expected.items():
            assert not torch.equal(wanted, start[name])
            close(first[name], wanted, 5 * USUAL, msg=str(case))
            assert torch.equal(first[name], second[name]), (case, name)
