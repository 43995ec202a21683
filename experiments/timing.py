"""What calls cost beside each other, on a machine that others use too."""

import time
from collections.abc import Callable, Mapping


def least(
    calls: Mapping[str, Callable[[], object]],
    repetitions: int,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, float]:
    """Name -> seconds of one call: the minimum over `repetitions`, the calls taking turns.

    Each is called once before, untimed: the first call of a library prepares. A load that comes and
    goes meets all calls alike, and the minima leave out whatever it lengthened.

    Args:
        clock: CPU seconds of this process, so that waiting for a processor does not count.
    """
    for call in calls.values():
        call()
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(repetitions):
        for name, call in calls.items():
            began = clock()
            call()
            best[name] = min(best[name], clock() - began)
    return best
