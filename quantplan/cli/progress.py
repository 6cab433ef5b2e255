"""What a command shows while it works: on standard error, and on a terminal alone."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

    from quantplan.quantize import Progress as Written


class Shown:
    """What is shown of work that goes on; where nobody looks, nothing."""

    def __init__(self, bar: "Progress | None" = None) -> None:
        """Begins without a known amount.

        Args:
            bar: Where one task is shown.
        """
        self._bar = bar

    def count(self, done: int, total: int) -> None:
        """Says how much is done, and of how much."""
        if self._bar is not None:
            self._bar.update(
                self._bar.task_ids[0], completed=done, total=total, count=f"{done} of {total}"
            )

    def now(self, what: str) -> None:
        """Says what is being done."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], description=what)


def is_shown() -> bool:
    """Whether a person is looking, at a terminal that can move its cursor."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


@contextmanager
def working(what: str) -> Iterator[Shown]:
    """Shows what is being done, and for how long, until the block ends; nothing of it stays."""
    if not is_shown():
        yield Shown()
        return
    from rich.console import Console  # noqa: PLC0415 (slow to import, and not needed in a pipe)
    from rich.progress import (  # noqa: PLC0415
        BarColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
    )

    look = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[count]}"),
        TimeElapsedColumn(),
    )
    # Standard output stays as it is: it may be a file while the terminal shows the rest.
    with Progress(
        *look, console=Console(stderr=True), transient=True, redirect_stdout=False
    ) as bar:
        bar.add_task(what, total=None, count="")
        yield Shown(bar)


@contextmanager
def writing() -> Iterator["Callable[[Written], None]"]:
    """Shows how much of a file is written, once the first part of it is."""
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import (  # noqa: PLC0415
        BarColumn,
        DownloadColumn,
        Progress,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    bar = Progress(
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        redirect_stdout=False,
        disable=not is_shown(),
    )
    task = bar.add_task("quantize", total=None)

    def report(step: "Written") -> None:
        bar.start()
        bar.update(task, completed=step.done_bytes, total=step.total_bytes)

    try:
        yield report
    finally:
        if bar.live.is_started:
            bar.stop()
