"""What a plan is to be best at, and what it has to reach."""

import math
from dataclasses import dataclass, replace
from typing import Literal

Status = Literal["optimal", "within_gap", "gap_left", "time_limit"]
"""How a search for a plan ended: with the gap closed (the first two), with nothing left to try, or
because the time was up.
"""


@dataclass(frozen=True)
class Goal:
    """The objective and its limits.

    Attributes:
        best: ``quality``: the least loss within the limits; where no speed is asked for, time has
            the price that the policy states. ``speed``: the fastest decoding within the limits.
        min_decode_tps: Least decode speed in tokens per second, with the context full.
        max_turn_s: Longest time in seconds from an empty context to the end of an answer, for the
            prompt and the answer of the workload.
        max_loss_nats: Largest predicted loss of the model, in nats per token.
        max_file_bytes: Largest size of the tensors in the quantized file.
    """

    best: Literal["quality", "speed"] = "quality"
    min_decode_tps: float | None = None
    max_turn_s: float | None = None
    max_loss_nats: float | None = None
    max_file_bytes: int | None = None

    @classmethod
    def within(
        cls,
        min_decode_tps: float | None = None,
        max_turn_s: float | None = None,
        max_loss_nats: float | None = None,
    ) -> "Goal":
        """What a plan is best at: speed where its loss is limited, else quality."""
        best: Literal["quality", "speed"] = "quality" if max_loss_nats is None else "speed"
        return cls(best, min_decode_tps, max_turn_s, max_loss_nats)

    @property
    def at_best_speed(self) -> "Goal":
        """The fastest decoding within the other limits."""
        return replace(self, best="speed", min_decode_tps=None)

    @property
    def limits(self) -> tuple[float, ...]:
        """All limits that there are."""
        found = (self.min_decode_tps, self.max_turn_s, self.max_loss_nats, self.max_file_bytes)
        return tuple(limit for limit in found if limit is not None)

    @property
    def prices_time(self) -> bool:
        """Whether time has a price: where neither speed, time nor size is asked for."""
        limits = (self.min_decode_tps, self.max_turn_s, self.max_file_bytes)
        return self.best == "quality" and all(limit is None for limit in limits)

    def faults(self) -> list[str]:
        """A sentence for each limit that makes no sense."""
        limits = (
            ("speed asked for", self.min_decode_tps, "tokens/s", False),
            ("longest turn", self.max_turn_s, "s", False),
            ("largest file", self.max_file_bytes, "bytes", False),
            ("largest loss", self.max_loss_nats, "nats per token", True),
        )
        return [
            f"the {what} is {value} {unit}; it must be {'at least' if may_be_zero else 'above'} 0"
            for what, value, unit, may_be_zero in limits
            if value is not None
            and not (math.isfinite(value) and (value > 0 or (may_be_zero and value == 0)))
        ]
