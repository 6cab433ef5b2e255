"""Compares predicted devices with the buffers that the real llama.cpp printed."""

from collections.abc import Iterable, Sequence

import pytest

from quantplan.predict import DeviceUse
from quantplan.runtime.log import Buffers

# Build of llama.cpp in the installed wheel; it keeps a KV cache for glm4moe's skipped last block.
BUILD = 10434
_PRINTED_MIB = 0.0051  # llama.cpp prints two decimals


def assert_buffers(
    devices: Iterable[DeviceUse], buffers: Buffers, endpoints: Sequence[str], n_lines: int = 1
) -> None:
    """Weights and caches of every device equal what llama.cpp printed, to the last digit.

    Args:
        devices: What was predicted.
        buffers: What was printed.
        endpoints: Address of each GPU.
        n_lines: Lines at most whose sizes are in one buffer's sum.
    """
    rounding = _PRINTED_MIB * n_lines
    for device in devices:
        if device.name == "CPU":
            names = {n for n in (*buffers.model, *buffers.kv) if not n.startswith("RPC")}
        else:
            endpoint = endpoints[int(device.name.removeprefix("GPU"))]
            names = {n for n in (*buffers.model, *buffers.kv) if endpoint in n}
        # Each buffer is rounded when it is printed, so every one may add its half digit.
        weights = [buffers.model[n] for n in names & buffers.model.keys()]
        caches = [c[n] for c in (buffers.kv, buffers.recurrent) for n in names & c.keys()]
        assert sum(weights) == pytest.approx(
            device.weights_bytes / 2**20, abs=rounding * max(1, len(weights))
        ), device.name
        assert sum(caches) == pytest.approx(
            device.kv_bytes / 2**20, abs=rounding * max(1, len(caches))
        ), device.name
