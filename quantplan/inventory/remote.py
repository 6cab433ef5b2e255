"""A file behind HTTP or HTTPS, read in ranges."""

import re
import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager

import urllib3
from urllib3.exceptions import HTTPError, MaxRetryError

from quantplan.errors import SourceError
from quantplan.inventory.hub import authorization, refusal

# One request per block: large enough that a redirect and a round trip for each do not count.
_BLOCK_BYTES = 4 << 20
# A header is read twice, once for its hash: with the longest vocabularies it has about 20 MB.
_KEPT_BLOCKS = 6
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_REFUSED = (401, 403, 404)
# Answers that mean "later", besides those that state a time themselves.
_TEMPORARY = (429, 500, 502, 503, 504)


class HttpFile(AbstractContextManager["HttpFile"]):
    """A remote file that several threads may read at any place.

    Blocks are fetched whole; those that follow the one asked for are fetched meanwhile. A lost
    connection, a stalled one and a server that is busy are tried again.

    Attributes:
        name: The URL.
        size: Bytes of the whole file.
        identity: Size and ETag (or date), which change when the file does.
        cache_key: URL and identity; None where the server states neither ETag nor date.
    """

    def __init__(
        self,
        url: str,
        *,
        read_ahead: int = 0,
        timeout_s: float = 30,
        retries: int = 5,
        block_bytes: int = _BLOCK_BYTES,
    ) -> None:
        """Asks for the size of the file.

        Args:
            url: Where the file is; redirections are followed.
            read_ahead: Blocks to fetch before they are needed.
            timeout_s: How long a server may be silent before the connection is given up.
            retries: How often a request is tried again, with growing pauses.
            block_bytes: Bytes per request.

        Raises:
            SourceError: There is no such file, or the server cannot send a part of one.
        """
        self.name = url
        self._block_bytes = block_bytes
        self._read_ahead = read_ahead
        self._http = urllib3.PoolManager(
            maxsize=read_ahead + 1,
            timeout=urllib3.Timeout(timeout_s),
            retries=urllib3.Retry(
                retries,
                backoff_factor=0.25,
                status_forcelist=_TEMPORARY,
                allowed_methods={"GET"},
                raise_on_status=False,
            ),
        )
        self._lock = threading.Lock()
        self._blocks: OrderedDict[int, Future[bytes]] = OrderedDict()
        self._version: tuple[int, str | None] | None = None
        _, self._version = self._request(0, 1)
        self.size, validator = self._version
        self.identity = f"{self.size} {validator}"
        self.cache_key = f"{url} {self.identity}" if validator else None
        self._pool = ThreadPoolExecutor(read_ahead + 1)

    def __exit__(self, *_: object) -> None:
        """Closes the connections."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._http.clear()

    def read_at(self, offset: int, n_bytes: int) -> bytes:
        """Reads bytes; fewer come back at the end of the file.

        Raises:
            SourceError: The server fails for good, or contradicts what it said before.
        """
        end = min(offset + n_bytes, self.size)
        parts = []
        while offset < end:
            number, begin = divmod(offset, self._block_bytes)
            part = self._block(number)[begin : begin + end - offset]
            parts.append(part)
            offset += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fills a buffer from one place of the file.

        Raises:
            SourceError: As `read_at`.
        """
        buffer[:] = self.read_at(offset, len(buffer))

    def _block(self, number: int) -> bytes:
        """A block, from memory where it is there, with those that follow on their way."""
        last = (self.size - 1) // self._block_bytes
        with self._lock:
            for index in range(number, min(number + self._read_ahead, last) + 1):
                if index not in self._blocks:
                    self._blocks[index] = self._pool.submit(self._fetch, index)
            self._blocks.move_to_end(number)
            found = self._blocks[number]
            while len(self._blocks) > 2 * self._read_ahead + _KEPT_BLOCKS:
                self._blocks.popitem(last=False)
        return found.result()

    def _fetch(self, number: int) -> bytes:
        begin = number * self._block_bytes
        return self._request(begin, min(begin + self._block_bytes, self.size))[0]

    def _request(self, begin: int, end: int) -> tuple[bytes, tuple[int, str | None]]:
        """Fetches a range; returns it, and what tells versions of the file apart: size, tag."""
        span = f"bytes={begin}-{end - 1}"
        try:
            # urllib3 drops the authorization where a redirection leads to another host.
            headers = {"Range": span, **authorization(self.name)}
            reply = self._http.request("GET", self.name, headers=headers, redirect=True)
        except MaxRetryError as error:
            raise SourceError(
                f"{self.name}: the connection failed at {span}: {error.reason}. Go on when the "
                "server answers again"
            ) from error
        except (HTTPError, ValueError) as error:
            raise SourceError(f"{self.name}: {error}") from error
        if reply.status == 200:
            raise SourceError(
                f"{self.name}: the server ignores ranges and sends the whole file; download it "
                "and name the local copy"
            )
        if reply.status != 206:
            hint = ""
            if reply.status in _REFUSED:
                hint = refusal(self.name, has_token="Authorization" in headers)
            raise SourceError(f"{self.name}: HTTP {reply.status} {reply.reason} for {span}{hint}")
        stated = _CONTENT_RANGE.fullmatch(reply.headers.get("Content-Range", ""))
        if stated is None or (int(stated[1]), int(stated[2])) != (begin, end - 1):
            raise SourceError(
                f"{self.name}: the server was asked for {span} and answers with "
                f"{reply.headers.get('Content-Range')!r}"
            )
        if len(reply.data) != end - begin:
            raise SourceError(
                f"{self.name}: the server sent {len(reply.data)} bytes instead of {end - begin}"
            )
        validator = reply.headers.get("ETag") or reply.headers.get("Last-Modified")
        version = int(stated[3]), validator
        if self._version not in (None, version):
            raise SourceError(
                f"{self.name}: the file has changed while it was read: {stated[3]} bytes, "
                f"{validator}, instead of {self.identity.replace(' ', ' bytes, ', 1)}; start again"
            )
        return reply.data, version
