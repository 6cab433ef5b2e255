"""Devices of other hosts: where they are, and what the way there costs."""

import re

from pydantic import Field

from quantplan.errors import MachineError
from quantplan.schema import Frozen
from quantplan.units import parse_bytes_per_s, parse_seconds

# RPC 192.168.1.7:50052 RTX 3090@1Gbit/s,0.2ms
_TERM = re.compile(
    r"\s*(?P<count>\d{1,3}\s*[xX]\s*)?RPC\s+(?P<endpoint>[^\s@,]+:\d{1,5})\s+(?P<gpu>[^@]+(?:@[^@]+)?)"
    r"@\s*(?P<rate>[^@,]+?)\s*,\s*(?P<latency>[^@,]+?)\s*"
)
_IS_RPC = re.compile(r"\s*(?:\d{1,3}\s*[xX]\s*)?RPC\b")


class Network(Frozen):
    """The way to a device that another host lends through ggml-rpc-server.

    Attributes:
        endpoint: ``HOST:PORT`` of the server, as llama.cpp's ``--rpc`` takes it.
        bytes_per_s: Rate at which the network carries bytes.
        latency_s: Seconds for a message to the host and back, as ``ping`` shows.
    """

    endpoint: str
    bytes_per_s: float = Field(gt=0, allow_inf_nan=False)
    latency_s: float = Field(ge=0, allow_inf_nan=False)

    def seconds(self, n_bytes: float, n_ways: float) -> float:
        """Seconds to send bytes to the device or to fetch some from it, so many times.

        A fetch waits for the answer; what is sent is not waited for, but the next fetch is behind
        it. So one way counts as half of what a message there and back takes.

        Args:
            n_bytes: Each time.
            n_ways: How many times.
        """
        return n_ways * (self.latency_s / 2 + n_bytes / self.bytes_per_s)


def split_network(term: str) -> tuple[str, Network | None]:
    """Takes the network out of one term of a machine's text.

    Args:
        term: For example ``RPC 192.168.1.7:50052 RTX 3090@1Gbit/s,0.2ms``.

    Returns:
        The term of the GPU alone (``RTX 3090``), and the way to it; None where it is of this host.

    Raises:
        MachineError: The term starts with ``RPC`` and does not go on as it should.
    """
    if _IS_RPC.match(term) is None:
        return term, None
    match = _TERM.fullmatch(term)
    if match is None:
        raise MachineError(
            f"{term.strip()!r} is no device of another host: write for example "
            "RPC 192.168.1.7:50052 RTX 3090@1Gbit/s,0.2ms, with the rate of the network and the "
            "time of a ping"
        )
    try:
        network = Network(
            endpoint=match["endpoint"],
            bytes_per_s=parse_bytes_per_s(match["rate"]),
            latency_s=parse_seconds(match["latency"]),
        )
    except ValueError as error:  # pydantic's too
        raise MachineError(f"{term.strip()!r}: {error}") from error
    return (match["count"] or "") + match["gpu"], network
