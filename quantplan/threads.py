"""How many threads may compute at once here."""

import os


def usable_threads() -> int:
    """Threads that may run at once, as far as the system says; containers may have fewer cores."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
