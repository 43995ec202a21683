"""Learned masks: a network at its initial weights, the useful ones chosen by gradient descent.

The paper's protocol: every weight has a score, SGD with momentum trains the scores for the
network's `score_iterations`, a mask is drawn anew in every step. Test accuracy is the mean of ten
masks drawn at the end, each for the whole test part; the mask of the weights more probable than not
is evaluated too. Nothing is chosen by validation or test data.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import lottery_sparse as ls
from experiments.study.networks import build, glorot_std
from experiments.study.runs import Run
from experiments.train.data import Dataset, permuted
from experiments.train.loop import Result, State, evaluation, minibatches, stepper
from experiments.train.lottery import train_models
from experiments.train.models import backend_of
from lottery_sparse.nn.supermask import Supermask

MOMENTUM = 0.9
SAMPLES = 10


class Checkpoints:
    """Where a run's state is kept. This one keeps nothing; a store has `load` and `save` alike."""

    def load(self, run_id: str) -> State | None:
        return None

    def save(self, run_id: str, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        pass


@dataclass(frozen=True)
class Learned:
    """What a learned mask leaves: what its row says beside the run, and sample 0 of the masks.

    The ticket is a mask and a seed; it computes what the network computed under sample 0.
    """

    run: Run
    row: dict[str, Any]
    ticket: ls.Ticket
    company: tuple[Run, ...]  # the runs learned side by side, this one among them


def learn(
    runs: Sequence[Run],
    dataset: Dataset,
    checkpoints: Checkpoints | None = None,
    *,
    every: int = 10_000,
    side_by_side: bool | None = None,
    on_step: Callable[[Run, int], None] = lambda run, iteration: None,
) -> Iterator[Learned]:
    """Yield the learned mask of each run as soon as it is there.

    A function of the run and the data set alone; killed and resumed from a checkpoint it gives the
    same bits. On the CPU that is so in any company too; a GPU's bits depend on it.

    Args:
        runs: with schedule "learned". Those with `trained` train the weights that sample 0 keeps by
            the network's protocol for weights afterwards, from their initial values, one by one.
        dataset: as loaded; it is permuted here as a run asks.
        checkpoints: keeps the state of a run every `every` iterations, and the last one.
        side_by_side: whether runs of one protocol are learned together, those resumed with those
            at the same iteration. None: on a GPU; one core gains nothing by it.
        on_step: called for each run after every iteration with the number done.

    Raises:
        ValueError: a run that is not of a learned mask, or scores that diverge.
    """
    for run in runs:
        if run.schedule != "learned":
            raise ValueError(f"{run.id} has schedule {run.schedule!r}, expected 'learned'.")
    kept = checkpoints or Checkpoints()
    if side_by_side is None:
        side_by_side = dataset.device.type != "cpu"
    sets: dict[str, Dataset] = {}
    for company in companies(runs, kept) if side_by_side else [(run,) for run in runs]:
        permutation = company[0].permuted
        if permutation not in sets:
            sets = {permutation: permuted(dataset, permutation)}  # one at a time: they are large
        yield from _learn(company, sets[permutation], kept, every, on_step)


def companies(runs: Sequence[Run], checkpoints: Checkpoints) -> list[tuple[Run, ...]]:
    """Runs that can be learned side by side: of one protocol and data set, equally far."""
    found: dict[tuple[object, ...], list[Run]] = {}
    for run in runs:
        state = checkpoints.load(run.id)
        done = 0 if state is None else state[1]["iteration"]
        kind = run.network, run.profile, run.permuted, run.rescale, done
        found.setdefault(kind, []).append(run)
    return [tuple(company) for company in found.values()]


def _learn(
    company: Sequence[Run],
    dataset: Dataset,
    checkpoints: Checkpoints,
    every: int,
    on_step: Callable[[Run, int], None],
) -> Iterator[Learned]:
    network = company[0].net
    models = [initial(run, dataset.device) for run in company]
    model = models[0] if len(models) == 1 else ls.ensemble.replicate(models)
    scores = [p for p in model.parameters() if p.requires_grad]
    optimizer = ls.optim.SGD(scores, lr=network.score_lr, momentum=MOMENTUM)
    done = 0
    for e, run in enumerate(company):
        if found := checkpoints.load(run.id):
            done = restore(model, optimizer, found, e)
    model.train()
    engine, take_step = stepper(model, optimizer)
    iterations, seeds = network.score_iterations, [run.seed for run in company]
    batches = minibatches(dataset.train, iterations, network.score_batch_size, seeds, done)
    for images, labels in batches:
        take_step(images, labels)
        done += 1
        if done % every == 0 or done == iterations:
            for e, run in enumerate(company):
                tensors, metadata = state(model, optimizer, done, e, len(company))
                check(run, tensors, done)
                checkpoints.save(run.id, tensors, metadata)
        for run in company:
            on_step(run, done)
    for e, run in enumerate(company):
        one = model if len(company) == 1 else ls.ensemble.select(model, e)
        row, ticket = evaluated(run, one, dataset)
        row = {"round": 1, "iterations": iterations, "engine": engine, **row, **backend_of(one)}
        if run.trained:
            row |= train_weights(run, one, ticket.masks, dataset).numbers
        yield Learned(run, row, ticket, tuple(company))


def initial(run: Run, device: torch.device | str) -> nn.Module:
    """The network of a run with scores to learn, in training mode."""
    model = build(run.net, run.seed, device)
    ls.supermask_(model, run.weights, run.rescale, run.init_score, run.seed)
    return model


# ---- state, for checkpoints ----------------------------------------------------------------------


def state(
    model: nn.Module, optimizer: torch.optim.Optimizer, done: int, e: int, networks: int
) -> State:
    """Scores, keys of the draws, momentum, of network e. The weights are those of the run's seed.

    networks: how many there are, which is also how many shared the time.
    """
    tensors: dict[str, Tensor] = {}
    for name, layer in layers(model):
        held = {
            "score": layer.score.detach(),
            "key": layer.key,
            "momentum": optimizer.state[layer.score]["momentum_buffer"],
        }
        for what, tensor in held.items():
            tensors[f"{what}.{name}"] = tensor if networks == 1 else tensor[e]
    return tensors, {"iteration": done, "networks": networks}


@torch.no_grad()
def restore(model: nn.Module, optimizer: torch.optim.Optimizer, found: State, e: int) -> int:
    """Put a state back as that of network e; the number of iterations that led to it."""
    tensors, metadata = found
    for name, layer in layers(model):
        held = optimizer.state[layer.score]
        momentum = held.setdefault("momentum_buffer", torch.zeros_like(layer.score))
        for what, here in (("score", layer.score), ("key", layer.key), ("momentum", momentum)):
            value = tensors[f"{what}.{name}"]
            (here if here.shape == value.shape else here[e]).copy_(value)
    return metadata["iteration"]


def check(run: Run, tensors: dict[str, Tensor], done: int) -> None:
    """Refuse scores that are no numbers, which would be learned on and stored."""
    if not all(t.isfinite().all() for name, t in tensors.items() if name.startswith("score.")):
        raise ValueError(
            f"scores of {run.id} are not finite at iteration {done}; with score_lr "
            f"{run.net.score_lr} they diverge: give a lower one."
        )


def layers(model: nn.Module) -> Iterable[tuple[str, Supermask]]:
    return [(name, m) for name, m in model.named_modules() if isinstance(m, Supermask)]


# ---- what is reported ----------------------------------------------------------------------------


def evaluated(run: Run, model: nn.Module, dataset: Dataset) -> tuple[dict[str, Any], ls.Ticket]:
    """What a row says of the masks, and sample 0, which density and sizes are those of."""
    model.eval()
    accuracies, losses = [], []
    for _ in ls.learning.sampled(model, SAMPLES):
        accuracies.append(evaluation(model, dataset.test)[1])
        losses.append(evaluation(model, dataset.val)[0])
    ls.learning.use_masks_(model, "threshold")
    threshold = evaluation(model, dataset.test)[1]
    ls.learning.use_masks_(model, 0)
    ticket = ls.Ticket.of(model, sources(run, model))
    expected = sum(float(m.score.detach().double().sigmoid().sum()) for _, m in layers(model))
    return {
        "density": ticket.masks.density,
        "kept": ticket.masks.kept,
        "test_accuracy": sum(accuracies) / SAMPLES,
        "sample_accuracies": accuracies,
        "threshold_accuracy": threshold,
        "expected_density": expected / ticket.masks.total,
        "final_validation_loss": sum(losses) / SAMPLES,
        "mask_bits": ticket.bits["masks"],
        "seed_bits": ticket.bits["seeds"],
    }, ticket


def sources(run: Run, model: nn.Module) -> dict[str, ls.nn.frozen.Seeded | ls.nn.frozen.SignOf]:
    """How each weight is made of the run's seed."""
    found: dict[str, ls.nn.frozen.Seeded | ls.nn.frozen.SignOf] = {}
    for name, layer in layers(model):
        weight = f"{name}.weight"
        source = ls.nn.frozen.Seeded("truncated_normal", run.seed, glorot_std(layer.weight.shape))
        constant = float(layer.weight.abs().max())
        found[weight] = source if run.weights == "init" else ls.nn.frozen.SignOf(source, constant)
    return found


# ---- a learned mask as a ticket ------------------------------------------------------------------


def train_weights(run: Run, model: nn.Module, masks: ls.Masks, dataset: Dataset) -> Result:
    """Train the weights that the masks keep by the network's protocol; in place."""
    ls.sparsify_(model, learned=masks)
    model.train()
    ls.compact_(model)
    [result] = train_models([run], model, dataset)
    return result
