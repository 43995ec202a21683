"""The one training loop: Adam at a constant rate, validation every 100 iterations, early stop.

No regularisation, no augmentation, no schedule. The "early-stop iteration" is where the validation
loss was lowest; a run takes its full number of iterations all the same, unless it has patience.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lottery_sparse as ls
from experiments.study.networks import EVALUATION_BATCH
from experiments.train.data import Dataset, Split, batches
from experiments.train.models import moving_buffers
from lottery_sparse.ops import dispatch

MOST_ON_GPU = 8_000  # images times networks per forward pass: 2 GB for a layer of conv6
State = tuple[dict[str, Tensor], dict[str, Any]]  # tensors, and metadata that is JSON
NUMBERS = (  # of a `Result`, in rows
    "test_accuracy", "final_test_accuracy", "early_stop_iteration", "early_stop_validation_loss",
    "early_stop_validation_accuracy", "final_validation_loss", "final_train_accuracy",
)  # fmt: skip
EPS = 1e-8  # torch's form of Adam adds it after the bias correction, TensorFlow's before


@dataclass(frozen=True)
class Evaluation:
    iteration: int
    validation_loss: float
    validation_accuracy: float


@dataclass(frozen=True)
class Result:
    """What a training run reports. Accuracies are fractions of the images of the part named."""

    iterations: int  # that it took
    early_stop_iteration: int  # of the lowest validation loss; the first one if equal
    early_stop_validation_loss: float
    early_stop_validation_accuracy: float
    test_accuracy: float  # at the early-stop iteration: the number that the paper reports
    final_test_accuracy: float
    final_validation_loss: float
    final_validation_accuracy: float
    final_train_accuracy: float | None
    seconds: float  # of all networks that were trained together
    engine: str  # how a step was computed: "modules", or "train_step" in one call
    evaluations: tuple[Evaluation, ...]  # iteration 0, every `evaluate_every`, and the last

    @property
    def numbers(self) -> dict[str, Any]:
        """Those that a row has."""
        return {name: getattr(self, name) for name in NUMBERS}


class Midway:
    """Keeps the state of a training in flight, so that another process can go on with it."""

    def load(self) -> State | None:
        """The state that was kept; None if there is none."""
        raise NotImplementedError

    def is_due(self) -> bool:
        """Whether to keep the state now: asked after each look at the validation part."""
        raise NotImplementedError

    def save(self, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        raise NotImplementedError


def train(model: nn.Module, dataset: Dataset, *, seed: int, **settings: Any) -> Result:
    """Train one network; see `train_together`."""
    [result] = train_together(model, dataset, seeds=[seed], **settings)
    return result


def train_together(
    model: nn.Module,
    dataset: Dataset,
    *,
    iterations: int,
    lr: float,
    batch_size: int,
    seeds: Sequence[int],
    first: int = 0,
    evaluate_every: int = 100,
    patience: int | None = None,
    train_accuracy: bool = True,
    on_step: Callable[[int], None] = lambda iteration: None,
    midway: Midway | None = None,
) -> list[Result]:
    """Train `model` in place and leave it with its final weights.

    Args:
        model: one network, or with more seeds as many side by side (`ls.ensemble.replicate`). Each
            trains as it would alone: on the CPU with the same bits.
        seeds: of each network; with the epoch it decides the order of the batches, nothing else.
        iterations, first: training goes from iteration `first` to `iterations`; what is reported
            counts alike. The batches are those that follow there.
        evaluate_every: iterations between two looks at the validation part. The last iteration
            is always evaluated and stored.
        patience: training ends at an evaluation so many iterations after the lowest validation
            loss; None: after `iterations`. Of networks side by side, each ends as it would alone.
        train_accuracy: evaluate the training part at the end; None is reported otherwise.
        on_step: called after every iteration with the number done: for progress bars, and to copy
            the weights of an early iteration (late rewinding).
        midway: keeps the state of a single network now and then; a training that goes on from it
            gives the same bits. Ignored for several.

    Returns:
        A result for each seed.

    Test accuracy at the early-stop iteration is computed once, at the end, from a copy of the
    weights that were best so far: the number is the same and most test passes are saved.

    Raises:
        ValueError: the loss becomes NaN or infinite at an evaluation.
    """
    start = time.perf_counter()
    parameters = list(model.parameters())
    optimizer = adam(parameters, lr)
    moving = [*parameters, *moving_buffers(model)]
    watch = _Watch(moving, len(seeds), lr, patience)
    midway = midway if len(seeds) == 1 else None
    if midway and (found := midway.load()):
        done = restore(optimizer, watch, found)
        start -= found[1]["seconds"]
    else:
        done = first
        watch(first, evaluations(model, dataset.val, len(seeds)))
    engine, take_step = stepper(model, optimizer)
    for iteration, (images, labels) in enumerate(
        minibatches(dataset.train, iterations, batch_size, seeds, done), start=done + 1
    ):
        take_step(images, labels)
        looks = iteration % evaluate_every == 0 or iteration == iterations
        if looks:
            watch(iteration, evaluations(model, dataset.val, len(seeds)))
        on_step(iteration)
        if watch.all_ended:
            break
        if looks and iteration < iterations and midway and midway.is_due():
            midway.save(*state(optimizer, watch, time.perf_counter() - start))

    final_weights = watch.final_weights()
    assign_(moving, final_weights)
    final_tests = evaluations(model, dataset.test, len(seeds))
    final_trains = evaluations(model, dataset.train, len(seeds)) if train_accuracy else None
    assign_(moving, watch.best_weights)
    tests = evaluations(model, dataset.test, len(seeds))
    assign_(moving, final_weights)
    seconds = time.perf_counter() - start
    return [
        Result(
            iterations=watch.seen[e][-1].iteration - first,
            early_stop_iteration=best.iteration,
            early_stop_validation_loss=best.validation_loss,
            early_stop_validation_accuracy=best.validation_accuracy,
            test_accuracy=tests[e][1],
            final_test_accuracy=final_tests[e][1],
            final_validation_loss=watch.seen[e][-1].validation_loss,
            final_validation_accuracy=watch.seen[e][-1].validation_accuracy,
            final_train_accuracy=final_trains[e][1] if final_trains else None,
            seconds=seconds,
            engine=engine,
            evaluations=tuple(watch.seen[e]),
        )
        for e, best in enumerate(watch.best)
    ]


# ---- state, to go on from ------------------------------------------------------------------------


def state(optimizer: torch.optim.Optimizer, watch: "_Watch", seconds: float) -> State:
    """All that the steps from here on depend on: of parameters, Adam and the evaluations."""
    tensors: dict[str, Tensor] = {}
    for i, (parameter, best) in enumerate(zip(watch.parameters, watch.best_weights, strict=True)):
        held = {"weight": parameter.detach(), "best": best, **optimizer.state.get(parameter, {})}
        tensors |= {f"{name}.{i}": value for name, value in held.items()}
    seen = [[e.iteration, e.validation_loss, e.validation_accuracy] for e in watch.seen[0]]
    return tensors, {"seen": seen, "seconds": seconds}


@torch.no_grad()
def restore(optimizer: torch.optim.Optimizer, watch: "_Watch", found: State) -> int:
    """Put a state back; the iteration that led to it."""
    tensors, metadata = found
    for i, (parameter, best) in enumerate(zip(watch.parameters, watch.best_weights, strict=True)):
        held = {n.partition(".")[0]: t for n, t in tensors.items() if n.endswith(f".{i}")}
        parameter.copy_(held.pop("weight"))
        best.copy_(held.pop("best"))
        if "step" in held:  # no buffer has one; a number, which torch keeps where it is cheapest
            optimizer.state[parameter] = {"step": held.pop("step")} | {
                name: torch.zeros_like(parameter).copy_(value) for name, value in held.items()
            }
    watch.seen[0] = [Evaluation(*one) for one in metadata["seen"]]
    watch.best[:] = [min(watch.seen[0], key=lambda one: one.validation_loss)]  # the first of equals
    return watch.seen[0][-1].iteration


class _Watch:
    """The evaluations of each network so far, and what it was at the best of them."""

    def __init__(
        self, parameters: Sequence[Tensor], networks: int, lr: float, patience: int | None
    ):
        self.parameters, self.lr, self.patience = parameters, lr, patience
        self.seen: list[list[Evaluation]] = [[] for _ in range(networks)]
        self.best: list[Evaluation] = []
        self.best_weights = [parameter.detach().clone() for parameter in parameters]
        self.ended: dict[int, list[Tensor]] = {}  # network -> its parameters where it ran out

    @property
    def all_ended(self) -> bool:
        return len(self.ended) == len(self.seen)

    def final_weights(self) -> list[Tensor]:
        """The parameters with which each network ended, or now if it has not."""
        found = [parameter.detach().clone() for parameter in self.parameters]
        for e, weights in self.ended.items():
            for now, ended in zip(found, weights, strict=True):
                self._of(now, e).copy_(ended)
        return found

    def _of(self, tensor: Tensor, e: int) -> Tensor:
        """The part of network e of a parameter, or of what is like one."""
        return tensor if len(self.seen) == 1 else tensor[e]

    @torch.no_grad()
    def __call__(self, iteration: int, found: list[tuple[float, float]]) -> None:
        for e, (loss, accuracy) in enumerate(found):
            if e in self.ended:
                continue
            if not loss < float("inf"):
                raise ValueError(
                    f"validation loss is {loss} at iteration {iteration}; with lr {self.lr} the "
                    "training diverges: give a lower one."
                )
            now = Evaluation(iteration, loss, accuracy)
            self.seen[e].append(now)
            if len(self.best) == e:
                self.best.append(now)
            elif loss < self.best[e].validation_loss:
                self.best[e] = now
                for kept, parameter in zip(self.best_weights, self.parameters, strict=True):
                    self._of(kept, e).copy_(self._of(parameter, e))
            if self.patience is not None and iteration - self.best[e].iteration >= self.patience:
                self.ended[e] = [self._of(p, e).detach().clone() for p in self.parameters]


def adam(parameters: Iterable[Tensor], lr: float) -> torch.optim.Adam:
    """Adam as the protocol has it; fused where our kernel does not run."""
    return ls.optim.Adam(parameters, lr=lr, eps=EPS, fused=True)


def stepper(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[str, Callable[[Tensor, Tensor], object]]:
    """How steps are computed: in one call if the model is a stack of linear layers."""
    if dispatch.forced() in (None, "cpu"):
        with contextlib.suppress(ValueError, TypeError):  # not such a stack
            return "train_step", ls.train_step(model, optimizer)
    return "modules", partial(step, model, optimizer)


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor
) -> None:
    """One step by modules; for networks side by side the loss is the sum of their means."""
    optimizer.zero_grad(set_to_none=True)
    logits = model(images)
    networks = logits.shape[0] if logits.dim() == 3 else 1
    labels = labels.expand(*logits.shape[:-1])
    (F.cross_entropy(logits.flatten(0, -2), labels.flatten()) * networks).backward()
    optimizer.step()


def minibatches(
    split: Split, iterations: int, batch_size: int, seeds: Sequence[int], first: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield pairs (images, labels), epoch after epoch in the order of data.batches: those after
    number `first` of `iterations`.

    Of networks with one seed the pair is [B, ...], shared; else [E, B, ...].
    """
    if len(set(seeds)) == 1:
        seeds = seeds[:1]
    per_epoch = len(split) // batch_size
    flat = split.images.flatten(1)  # a view, of which rows are gathered faster
    shape = split.images.shape[1:]
    done = first
    while done < iterations:
        epoch, at = divmod(done, per_epoch)
        orders = [batches(len(split), batch_size, seed, epoch) for seed in seeds]
        order = orders[0] if len(seeds) == 1 else torch.stack(orders, 1)  # [step, (E,) B]
        for indices in order[at : at + iterations - done].to(split.labels.device):
            images = flat.index_select(0, indices.flatten()).view(*indices.shape, *shape)
            yield images, split.labels[indices]
        done += per_epoch - at


def evaluation(model: nn.Module, split: Split) -> tuple[float, float]:
    """Mean cross-entropy and accuracy of one network over all images of a part."""
    [found] = evaluations(model, split)
    return found


@torch.no_grad()
def evaluations(model: nn.Module, split: Split, networks: int = 1) -> list[tuple[float, float]]:
    """Mean cross-entropy and accuracy over all images of a part, of each network."""
    learns = model.training
    model.eval()
    size = at_once(networks, split.images.device)
    if split.images.is_cpu:
        size = getattr(model, "evaluation_batch", size)
    loss: Tensor | int = 0
    correct: Tensor | int = 0
    for images, labels in zip(split.images.split(size), split.labels.split(size), strict=True):
        logits = model(images)
        if logits.dim() == 2:
            logits = logits.unsqueeze(0)
        labels = labels.expand(logits.shape[0], -1)
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        loss += losses.view_as(labels).double().sum(1)
        correct += (logits.argmax(2) == labels).sum(1)
    model.train(learns)
    assert isinstance(loss, Tensor)
    assert isinstance(correct, Tensor)
    means, shares = loss / len(split), correct.double() / len(split)
    return list(zip(means.tolist(), shares.tolist(), strict=True))


def at_once(networks: int, device: torch.device) -> int:
    """Images per forward pass. On the CPU so many for every group: bits may depend on it."""
    if device.type == "cpu":
        return EVALUATION_BATCH
    return max(1, min(EVALUATION_BATCH, MOST_ON_GPU // networks))


@torch.no_grad()
def assign_(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
