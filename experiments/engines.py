"""temporary"""

ENGINES = ("inline", "process")


def sweep(groups, work, *, engine, workers, scheduler, devices):
    for group in groups:
        work(group)
    return 0
