"""Work in threads whose results come in order."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Place = TypeVar("Place")
Result = TypeVar("Result")


def in_order(
    work: Callable[[Place, Item], Result],
    items: Iterable[Item],
    places: Iterable[Place],
    threads: int,
) -> Generator[tuple[Item, Result], None, None]:
    """Works on items in threads and yields them with their results, in order.

    Args:
        work: What to do with an item at a place.
        items: Taken only when there is a place for them.
        places: What an item in flight has for itself; used again once the item after its own
            is asked for. Their number bounds the items in flight.
        threads: How many to use.

    Raises:
        Exception: What ``work`` raises for an item, when it is the item's turn.
    """
    free = list(places)
    flying: deque[tuple[Item, Place, Future[Result]]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for item in items:
            if not free:
                first, place, future = flying.popleft()
                yield first, future.result()
                free.append(place)
            place = free.pop()
            flying.append((item, place, pool.submit(work, place, item)))
        for item, _, future in flying:
            yield item, future.result()
    finally:
        pool.shutdown(cancel_futures=True)
