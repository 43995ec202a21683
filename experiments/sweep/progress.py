"""Progress on a terminal, plain lines otherwise."""

import importlib.util
import sys
from types import TracebackType

INSTALL = "pip install 'lottery-sparse[experiments]'"


def warning_line(message: Warning | str, *_: object) -> None:
    """A warning as one line, without the place in the source that gives it."""
    print(f"warning: {message}", file=sys.stderr)


class Progress:
    """One bar that counts iterations, with finished lines printed above it.

    Where stdout is no terminal, or rich is not installed, only the lines are printed.
    """

    def __init__(self, total: int):
        self._bar = None
        if not sys.stdout.isatty():
            return
        if importlib.util.find_spec("rich") is None:
            print(f"(progress bars need rich: {INSTALL})")
            return
        from rich import progress

        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.TaskProgressColumn(),
            progress.TimeRemainingColumn(),
            transient=True,
        )
        self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def describe(self, text: str) -> None:
        """What is being done now, shown beside the bar."""
        if self._bar is not None:
            self._bar.update(self._task, description=text)

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.advance(self._task)

    def line(self, text: str = "") -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)
