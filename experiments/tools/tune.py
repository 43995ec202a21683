"""Which learning rate of the scores learns a mask soonest, by validation data.

The paper gives a rate for FC only. Each rate trains the scores of the same network from the same
start with the same batches and draws; nothing but the validation part is looked at.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

import lottery_sparse as ls
from experiments.study.runs import DENSE, Run
from experiments.train.data import Dataset
from experiments.train.learned import MOMENTUM, initial
from experiments.train.loop import evaluation, minibatches, stepper

DRAWS = 3  # masks of a look
LOOKS = 4  # at the validation part, evenly spread over the iterations
RATES = (10.0, 30.0, 100.0, 300.0)


def tune(
    network: str, dataset: Dataset, rates: Sequence[float], iterations: int, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """Yield for each rate and look: rate, iteration, validation loss and accuracy, density.

    Loss and accuracy are means of masks drawn then. A rate that is far too high does not diverge,
    as sigmoids saturate: its loss stays high.

    Raises:
        ValueError: a rate is not positive, or there are fewer iterations than looks.
    """
    if not rates or not all(0 < rate < float("inf") for rate in rates):
        raise ValueError(f"rates must be positive numbers, got {list(rates)}.")
    if iterations < LOOKS:
        raise ValueError(f"iterations must be {LOOKS} or more, got {iterations}.")
    run = Run(
        network=network,
        profile="paper",
        seed=seed,
        schedule="learned",
        criterion=DENSE,
        trained=False,
    )
    looks = {iterations * look // LOOKS for look in range(1, LOOKS + 1)}
    for rate in rates:
        model = initial(run, dataset.device)
        scores = [p for p in model.parameters() if p.requires_grad]
        _, take_step = stepper(model, ls.optim.SGD(scores, lr=rate, momentum=MOMENTUM))
        model.train()
        batches = minibatches(dataset.train, iterations, run.net.score_batch_size, [seed])
        for done, (images, labels) in enumerate(batches, start=1):
            take_step(images, labels)
            if done in looks:
                loss, accuracy = _look(model, dataset)
                density = float(sum(s.detach().double().sigmoid().sum() for s in scores))
                yield {
                    "network": network,
                    "rate": rate,
                    "iteration": done,
                    "validation_loss": loss,
                    "validation_accuracy": accuracy,
                    "density": density / sum(s.numel() for s in scores),
                }


def _look(model: nn.Module, dataset: Dataset) -> tuple[float, float]:
    model.eval()
    found = [evaluation(model, dataset.val) for _ in ls.learning.sampled(model, DRAWS)]
    model.train()
    return sum(loss for loss, _ in found) / DRAWS, sum(right for _, right in found) / DRAWS
