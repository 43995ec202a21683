"""The one training loop: Adam at a constant rate, validation every 100 iterations, early stop.

No regularisation, no augmentation, no schedule. Nothing stops early: a run always takes its full
number of iterations, and the "early-stop iteration" is where the validation loss was lowest.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lottery_sparse as ls
from experiments.data import Dataset, Split, batches

EVALUATION_BATCH = 1_000  # images per forward pass; bounds the memory of the conv nets
EPS = 1e-8  # torch's form of Adam adds it after the bias correction, TensorFlow's before


@dataclass(frozen=True)
class Evaluation:
    iteration: int
    validation_loss: float
    validation_accuracy: float


@dataclass(frozen=True)
class Result:
    """What a training run reports. Accuracies are fractions of the images of the part named."""

    iterations: int
    early_stop_iteration: int  # of the lowest validation loss; the first one if equal
    early_stop_validation_loss: float
    early_stop_validation_accuracy: float
    test_accuracy: float  # at the early-stop iteration: the number that the paper reports
    final_test_accuracy: float
    final_validation_loss: float
    final_validation_accuracy: float
    final_train_accuracy: float | None
    seconds: float
    engine: str  # how a step was computed: "modules", or "train_step" in one call
    evaluations: tuple[Evaluation, ...]  # iteration 0, every `evaluate_every`, and the last


def train(
    model: nn.Module,
    dataset: Dataset,
    *,
    iterations: int,
    lr: float,
    batch_size: int,
    seed: int,
    evaluate_every: int = 100,
    train_accuracy: bool = True,
    on_step: Callable[[int], None] = lambda iteration: None,
) -> Result:
    """Train `model` in place and leave it with its final weights.

    Args:
        seed: with the epoch it decides the order of the batches, nothing else.
        evaluate_every: iterations between two looks at the validation part. The last iteration
            is always evaluated and stored.
        train_accuracy: evaluate the training part at the end; None is reported otherwise.
        on_step: called after every iteration with the number done: for progress bars, and to copy
            the weights of an early iteration (late rewinding).

    Test accuracy at the early-stop iteration is computed once, at the end, from a copy of the
    weights that were best so far: the number is the same and most test passes are saved.

    Raises:
        ValueError: the loss becomes NaN or infinite at an evaluation.
    """
    start = time.perf_counter()
    parameters = list(model.parameters())
    optimizer = adam(parameters, lr)
    engine, take_step = stepper(model, optimizer)
    evaluations: list[Evaluation] = []
    best: tuple[Evaluation, list[Tensor]] | None = None

    def evaluate(iteration: int) -> None:
        nonlocal best
        loss, accuracy = evaluation(model, dataset.val)
        if not loss < float("inf"):
            raise ValueError(
                f"validation loss is {loss} at iteration {iteration}; with lr {lr} the training "
                "diverges: give a lower one."
            )
        evaluations.append(Evaluation(iteration, loss, accuracy))
        if best is None or loss < best[0].validation_loss:
            best = evaluations[-1], [parameter.detach().clone() for parameter in parameters]

    evaluate(0)
    for iteration, (images, labels) in enumerate(
        minibatches(dataset.train, iterations, batch_size, seed), start=1
    ):
        take_step(images, labels)
        if iteration % evaluate_every == 0 or iteration == iterations:
            evaluate(iteration)
        on_step(iteration)

    assert best is not None
    stop, best_weights = best
    final_weights = [parameter.detach().clone() for parameter in parameters]
    final_test = evaluation(model, dataset.test)[1]
    final_train = evaluation(model, dataset.train)[1] if train_accuracy else None
    assign_(parameters, best_weights)
    test = evaluation(model, dataset.test)[1]
    assign_(parameters, final_weights)
    return Result(
        iterations=iterations,
        early_stop_iteration=stop.iteration,
        early_stop_validation_loss=stop.validation_loss,
        early_stop_validation_accuracy=stop.validation_accuracy,
        test_accuracy=test,
        final_test_accuracy=final_test,
        final_validation_loss=evaluations[-1].validation_loss,
        final_validation_accuracy=evaluations[-1].validation_accuracy,
        final_train_accuracy=final_train,
        seconds=time.perf_counter() - start,
        engine=engine,
        evaluations=tuple(evaluations),
    )


def adam(parameters: Iterable[Tensor], lr: float) -> torch.optim.Adam:
    """Adam as the protocol has it; fused where our kernel does not run."""
    return ls.optim.Adam(parameters, lr=lr, eps=EPS, fused=True)


def stepper(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[str, Callable[[Tensor, Tensor], object]]:
    """How steps are computed: in one call if the model is a stack of linear layers."""
    if ls.backends.forced() in (None, "cpu"):
        with contextlib.suppress(ValueError, TypeError):  # not such a stack
            return "train_step", ls.train_step(model, optimizer)
    return "modules", partial(step, model, optimizer)


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor
) -> None:
    optimizer.zero_grad(set_to_none=True)
    F.cross_entropy(model(images), labels).backward()
    optimizer.step()


def minibatches(
    split: Split, iterations: int, batch_size: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield `iterations` pairs (images, labels), epoch after epoch in the order of data.batches."""
    done = 0
    epoch = 0
    while done < iterations:
        order = batches(len(split), batch_size, seed, epoch).to(split.labels.device)
        for indices in order[: iterations - done]:
            yield split.images[indices], split.labels[indices]
        done += len(order)
        epoch += 1


@torch.no_grad()
def evaluation(model: nn.Module, split: Split) -> tuple[float, float]:
    """Mean cross-entropy and accuracy over all images of a part."""
    loss = torch.zeros((), dtype=torch.float64, device=split.labels.device)
    correct = torch.zeros((), dtype=torch.int64, device=split.labels.device)
    for images, labels in zip(
        split.images.split(EVALUATION_BATCH), split.labels.split(EVALUATION_BATCH), strict=True
    ):
        logits = model(images)
        loss += F.cross_entropy(logits, labels, reduction="sum").double()
        correct += (logits.argmax(1) == labels).sum()
    return loss.item() / len(split), correct.item() / len(split)


@torch.no_grad()
def assign_(parameters: list[Tensor], values: list[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
