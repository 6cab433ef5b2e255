"""Threads of this process to measure in, which end with what waits for them."""

import threading
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any


class EndingThreads(ThreadPoolExecutor):
    """Runs functions that take a ``watch``, and ends them where the block ends before they do.

    A ``ThreadPoolExecutor`` would wait for them, for hours perhaps, after Ctrl+C too.
    """

    def __init__(self, threads: int) -> None:
        """Starts no thread yet.

        Args:
            threads: How many at most.
        """
        super().__init__(threads)
        self._is_over = threading.Event()

    def submit(self, function: Any, /, *arguments: Any, **more: Any) -> Future[Any]:
        """Begins a function in a thread, with a ``watch`` that it calls many times a second."""
        return super().submit(function, *arguments, watch=self._watch, **more)

    def __exit__(self, *failure: Any) -> bool | None:
        """Ends what still runs."""
        self._is_over.set()
        return super().__exit__(*failure)

    def _watch(self) -> None:
        if self._is_over.is_set():
            raise CancelledError
