"""The loop for any model, `ls.find_ticket`, and that of the studies are one: the same tickets."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import lottery_sparse as ls
from experiments.study.networks import FC, build, keep_by_parameter
from experiments.study.runs import Profile, Run
from experiments.train import data
from experiments.train import loop as train
from experiments.train.lottery import lottery

ROUNDS, SEED = 3, 4
SHORT = replace(FC, iterations=8, batch_size=30)


@pytest.fixture(scope="module")
def mini() -> data.Dataset:
    mini = data.load("mnist-mini")
    few = {
        part: data.Split(getattr(mini, part).images[:120], getattr(mini, part).labels[:120])
        for part in ("val", "test")  # the evaluations are not what is compared
    }
    return replace(mini, **few)


class AsInTheStudies:
    """A train_fn with the batches and the optimizer of the studies, and their layers.

    Dense and masked products round differently, so round 0 trains plain layers, the others
    compact ones.
    """

    def __init__(self, dataset: data.Dataset, rewind_to: int):
        self.dataset, self.rewind_to, self.finals = dataset, rewind_to, []

    def __call__(self, model: nn.Module, stop_at: int | None = None) -> None:
        dense = ls.masks_of(model).density == 1
        ls.densify_(model) if dense else ls.compact_(model)
        train.train(
            model, self.dataset, seed=SEED, first=0 if dense else self.rewind_to,
            iterations=stop_at or SHORT.iterations, lr=SHORT.lr,
            batch_size=SHORT.batch_size, train_accuracy=False,
        )  # fmt: skip
        ls.sparsify_(ls.sparsify_(model))
        if stop_at is None:
            self.finals.append({n: v.clone() for n, v in ls.dense_state_dict(model).items()})


@pytest.mark.parametrize(
    "choice",
    [
        {"criterion": "large_final"},
        {"criterion": "random"},
        {"criterion": "magnitude_increase"},  # full of ties: inputs that are black in all images
        {"mask1": "signed_constant", "mask0": "freeze_init_zero_mask"},
        {"mask1": "reinit", "mask0": "freeze_init_zero_reshuffle"},
        {"mask1": "reshuffle", "mask0": "freeze_reinit"},
        {"mask1": "reinit_permute", "mask0": "freeze_init_zero_all", "compounding": True},
        {"criterion": "magnitude_increase", "rewind_to": 3},
        {"mask1": "mask_init", "mask0": "original"},
    ],
    ids=lambda choice: "-".join(map(str, choice.values())),
)
def test_both_loops_find_the_same_tickets(choice, mini):
    brief = Profile("brief", train_accuracy=False)
    run = Run(network=SHORT, profile=brief, seed=SEED, **choice)
    found: list[ls.Ticket] = []
    train_fn = AsInTheStudies(mini, run.rewind_to)
    keep = keep_by_parameter(SHORT)
    ls.find_ticket(
        build(SHORT, SEED), train_fn, ROUNDS, keep, generator=SEED, on_round=found.append, **choice
    )
    assert len(found) == ROUNDS + 1
    for round, ticket, final in zip(
        lottery(run, ROUNDS, mini), found, train_fn.finals, strict=True
    ):
        assert ticket.masks == round.start.masks, round.number
        for name, weight in round.start.weights.items():
            start = round.start.effective(name) if name in round.start.masks else weight
            assert torch.equal(ticket.start[name], start), (round.number, name)
            assert torch.equal(final[name], round.w_final[name]), (round.number, name)
    assert found[-1].masks.density < 0.6
