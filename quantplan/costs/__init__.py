"""What a choice costs: bytes (memory), seconds (speed), nats (quality)."""

import hashlib
import json
from functools import cache
from importlib.resources import files
from typing import Any

_DATA = files(__name__).joinpath("data")


@cache
def load_data(name: str) -> Any:
    """Reads a file of fitted or collected constants from ``costs/data``."""
    return json.loads(_DATA.joinpath(name).read_text(encoding="utf-8"))


@cache
def data_hashes() -> dict[str, str]:
    """SHA-256 of every data file that the cost models read, by file name."""
    return {
        entry.name: hashlib.sha256(entry.read_bytes()).hexdigest()
        for entry in sorted(_DATA.iterdir(), key=lambda e: e.name)
        if entry.name.endswith(".json")
    }
