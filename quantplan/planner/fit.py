r"""Where llama.cpp's ``--fit`` puts a model whose context is given.

Its steps, in llama.cpp b11434: all on the GPUs, if that fits. Else layers from the back, GPU by GPU
from the last, with the experts of all of them in RAM. Then, if the rest of the model fits so, full
layers from the front, GPU by GPU from the first. At last a part of one more layer on each GPU: its
up experts, then its gate experts too, or else its attention alone. The number of layers is found by
trial, as here. It knows neither the size of the RAM nor speeds.

It counts layers without next-token-prediction blocks, ``-ngl`` counts them too: where a model has
one, the first layer stays in RAM.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from quantplan.formats.llama_cpp import buffer_types
from quantplan.planner.plain import N_PARTS, Layouts, Outcomes, TypedModel, parts_of

# Parts of the first layer with experts in RAM that do not fit beside the rest of the layer, and the
# pattern of their names.
_OVERFLOWS = {
    "experts": (parts_of(kinds=["experts"]), "(up|down|gate_up|gate)_(ch|)exps"),
    "all but up": (parts_of(stems=["gate", "down"]), "(gate|gate_up|down).*"),
    "down": (parts_of(stems=["down"]), "down.*"),
    "all but attention": (parts_of(), "(up|gate|gate_up|down).*"),
}


@dataclass(frozen=True)
class _Share:
    """What a GPU gets: full layers, then layers without their experts."""

    n_layers: int = 0
    n_part: int = 0
    overflow: str = "experts"

    @property
    def n_full(self) -> int:
        return self.n_layers - self.n_part

    def plus(self, n_full: int, n_part: int = 0) -> "_Share":
        return replace(self, n_layers=self.n_layers + n_full + n_part, n_part=self.n_part + n_part)


@dataclass(frozen=True)
class Fitted:
    """What ``--fit`` comes to.

    Attributes:
        layout: The placement.
        outcome: Its memory and speed.
        flags: The flags that stand for it: ``-ngl``, ``-ts`` and ``-ot``.
    """

    layout: Layouts
    outcome: Outcomes
    flags: tuple[str, ...]


_Shares = tuple[_Share, ...]


@dataclass(frozen=True)
class _Trial:
    shares: _Shares
    used: NDArray[np.int64]


def _with(shares: _Shares, d: int, share: _Share) -> _Shares:
    return (*shares[:d], share, *shares[d + 1 :])


def _converted(shares: _Shares, d: int, n: int, start: int) -> _Shares:
    """The shares in which ``n`` layers without experts became full ones of a GPU."""
    for j in range(start, len(shares)):
        taken = min(n, shares[j].n_part)
        shares = _with(shares, j, shares[j].plus(0, -taken))
        shares = _with(shares, d, shares[d].plus(taken))
        n -= taken
    return shares


def fit(model: TypedModel) -> Fitted:
    """Follows ``--fit`` with the margins of the machine (``-fitt``)."""
    return _Fit(model).run()


class _Fit:
    def __init__(self, model: TypedModel) -> None:
        self.model, self.costs = model, model.costs
        self.n_gpus = self.costs.ram
        self.targets = self.costs.usable_bytes
        arch = self.costs.inventory.architecture
        self.n_all = arch.n_loaded_layers + 1
        self.is_moe = arch.n_expert > 0

    def run(self) -> Fitted:
        whole = self.costs.layouts([self.costs.homes(self.costs.n_layers + 1)])
        outcome = self.model.evaluate(whole)
        if (outcome.n_bytes[0, : self.n_gpus] <= self.targets[: self.n_gpus]).all():
            return Fitted(whole, outcome, ("-ngl", str(self.costs.n_layers + 1)))
        trial = self._fill_from_the_back()
        if self.is_moe and self._all_but_experts_fit():
            trial = self._fill_from_the_front(trial)
        layout = self._layout(trial.shares)
        return Fitted(layout, self.model.evaluate(layout), self._flags(trial.shares))

    def _try(self, shares: _Shares) -> _Trial:
        return _Trial(shares, self.model.evaluate(self._layout(shares)).n_bytes[0])

    def _all_but_experts_fit(self) -> bool:
        moved = np.full((N_PARTS, self.costs.n_layers), -1)
        moved[_OVERFLOWS["experts"][0]] = self.costs.ram
        layout = self.costs.layouts([self.costs.homes(self.costs.n_layers + 1)], [moved])
        used = self.model.evaluate(layout).n_bytes[0, : self.n_gpus]
        return bool((self.targets[: self.n_gpus] - used).sum() > 0)

    def _fill_from_the_back(self) -> _Trial:
        low = self._try((_Share(),) * self.n_gpus)
        for d in reversed(range(self.n_gpus)):
            shares = low.shares
            # The output layer, which is the last one, is always whole.
            n_whole = int(d == self.n_gpus - 1)

            def given(n: int, d: int = d, base: _Shares = shares, n_whole: int = n_whole) -> _Trial:
                n_full = min(n, n_whole) if self.is_moe else n
                return self._try(_with(base, d, base[d].plus(n_full, n - n_full)))

            n_left = self.n_all - sum(share.n_layers for share in shares)
            low = self._most(low, n_left, d, given)
        return low

    def _fill_from_the_front(self, low: _Trial) -> _Trial:
        start = min((d for d, share in enumerate(low.shares) if share.n_layers), default=0)
        for d in range(self.n_gpus):
            if d > start:
                break

            def given(n: int, d: int = d, base: _Shares = low.shares, start: int = start) -> _Trial:
                return self._try(_converted(base, d, n, start))

            low = self._most(low, sum(s.n_part for s in low.shares[start:]), d, given)
            left = [j for j in range(start, self.n_gpus) if low.shares[j].n_part]
            if not left:
                break
            start = left[0]
            low = self._with_part_of_a_layer(low, d, start)
            if not low.shares[start].n_part:
                start += 1
        return low

    def _most(self, low: _Trial, n_high: int, d: int, given: Callable[[int], _Trial]) -> _Trial:
        """The most layers that fit on a GPU, by false position."""
        if n_high == 0:
            return low
        n_low, high = 0, given(n_high)
        if high.used[d] <= self.targets[d]:
            return high
        while n_high - n_low > 1:
            slope = (high.used[d] - low.used[d]) / (n_high - n_low)
            step = int((self.targets[d] - low.used[d]) / slope) if slope > 0 else 1
            n = n_low + min(max(step, 1), n_high - n_low - 1)
            trial = given(n)
            if trial.used[d] <= self.targets[d]:
                n_low, low = n, trial
            else:
                n_high, high = n, trial
        return low

    def _with_part_of_a_layer(self, low: _Trial, d: int, start: int) -> _Trial:
        """The trial with a part of one more layer on a GPU, the rest on the next device."""
        base = _with(low.shares, start, low.shares[start].plus(0, -1))
        for overflows in (("all but up", "down"), ("all but attention",)):
            best = low
            for overflow in overflows:
                share = replace(base[d].plus(0, 1), overflow=overflow)
                trial = self._try(_with(base, d, share))
                ends = [j for j in (d, d + 1) if j < self.n_gpus]
                if not all(trial.used[j] < self.targets[j] for j in ends):
                    break
                best = trial
            if best is not low:
                return best
        return low

    def _named(self, shares: _Shares) -> list[tuple[int, str, int]]:
        """Layers whose tensors are named, with what overflows, and to which device."""
        found = []
        il = self.n_all - sum(share.n_layers for share in shares)
        for d, share in enumerate(shares):
            il += share.n_full
            for n in range(share.n_part):
                overflow = share.overflow if n == 0 else "experts"
                to = d + 1 if n == 0 and overflow != "experts" else self.costs.ram
                found.append((il + n, overflow, to))
            il += share.n_part
        return found

    def _layout(self, shares: _Shares) -> Layouts:
        moved = np.full((N_PARTS, self.costs.n_layers), -1)
        for il, overflow, to in self._named(shares):
            if il < self.costs.n_layers:
                moved[_OVERFLOWS[overflow][0], il] = to
        counts = [float(share.n_layers) for share in shares]
        n_gpu = int(sum(counts))
        homes = self.costs.homes(n_gpu, counts if n_gpu and self.n_gpus > 1 else ())
        return self.costs.layouts([homes], [moved])

    def _flags(self, shares: _Shares) -> tuple[str, ...]:
        n_gpu = sum(share.n_layers for share in shares)
        flags = ["-ngl", str(n_gpu)]
        if self.n_gpus > 1 and n_gpu:
            flags += ["-ts", ",".join(str(share.n_layers) for share in shares)]
        rules: dict[tuple[str, int], list[int]] = {}
        for il, overflow, to in self._named(shares):
            rules.setdefault((overflow, to), []).append(il)
        buffers, texts = buffer_types(self.costs.machine), []
        for (overflow, to), layers in rules.items():
            buffer = buffers[self.costs.machine.devices[to].name]
            numbers = "|".join(map(str, layers))
            texts.append(rf"blk\.({numbers})\.ffn_{_OVERFLOWS[overflow][1]}={buffer}")
        return (*flags, "-ot", ",".join(texts)) if texts else tuple(flags)
