"""Holds predicted memory against what published load logs printed.

    python benchmarks/validate_memory.py --cases CASES.jsonl.gz [--all]

Per case and device: predicted and measured KV cache, weights, compute buffer and total, in MiB. The
last line is one JSON object with shares and relative errors:

- ``kv_within_1pct``: KV cache and state of a case, all devices together.
- ``gpu_weights_within_0_5pct``: weights of a GPU, where the file's recipe is known: an ftype whose
  types and size are those that the log printed, with the placement flags as posted.
- ``compute_median_err``, ``compute_p90_err``: compute buffer of a GPU, or of the CPU where no GPU
  is used. Equal buffers of one case count once.
- ``vram_within_3pct``: weights, KV cache and compute buffer of a GPU together. Where the recipe is
  not known the printed weights stand in for the file, which would tell them; ``--all`` shows these.

A case that cannot be used is counted with its reason.
"""

import argparse
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measured_cases import MIB, Case, read_cases
from quantplan.configuration import Resolved
from quantplan.costs.memory import weight_bytes
from quantplan.errors import QuantplanError
from quantplan.ftypes import FTYPES, stock_mix
from quantplan.inventory import Inventory
from quantplan.placement import Placement, place
from quantplan.predict import DeviceUse, predict_resolved

_SAME_SIZE = 0.002
_KV_LIMIT, _WEIGHTS_LIMIT, _TOTAL_LIMIT = 0.01, 0.005, 0.03
_FIELDS = {
    "weights": "model_buffers_mib",
    "kv": "kv_buffers_mib",
    "compute": "compute_buffers_mib",
}


@dataclass(frozen=True)
class Row:
    """One device of one case; bytes, None where it was not printed or is not known."""

    case: str
    device: str
    predicted: Mapping[str, float | None]
    measured: Mapping[str, float | None]
