"""Machines: GPUs and the RAM, from text or a profile, with what was measured on them."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from quantplan.display import Table, html_card
from quantplan.errors import MachineError
from quantplan.hardware.device import Device, MachineValue
from quantplan.hardware.text import parse_text
from quantplan.schema import Frozen, read_saved, write_saved
from quantplan.units import gb_per_s, gib

# llama.cpp takes no more (LLAMA_MAX_DEVICES).
_MAX_GPUS = 16


def is_profile(text: str) -> bool:
    """Whether a text names a machine's profile: a file that is there, or is meant by its suffix."""
    try:
        is_there = Path(text).exists() and not Path(text).is_dir()
    except (OSError, ValueError):  # too long for a path, or with a NUL
        is_there = False
    return is_there or text.endswith(".json")


class ComputeMeasurement(Frozen):
    """A compute buffer that llama.cpp laid out on a machine.

    It is known for all flags under which the model of buffers predicts the same: what it predicts
    from (batch, cells, widths, what the device holds) is then the same.

    Attributes:
        model: What tells the model apart (``model_key``).
        kind: Of the device.
        predicted_bytes: What was predicted.
        measured_bytes: What it was.
        by: What laid it out, and when.
    """

    model: str
    kind: Literal["gpu", "cpu"]
    predicted_bytes: int = Field(gt=0)
    measured_bytes: int = Field(ge=0)
    by: str


class Machine(MachineValue):
    """One or more GPUs, or none, and the RAM.

    Attributes:
        gpus: GPUs in the order in which llama.cpp has them: those of other hosts first.
        ram: The CPU with its RAM.
        measured: What was measured on the machine, one sentence each.
        assumed: What is not known of it and was taken to be so, one sentence each.
        compute: Compute buffers that were measured on it.
        calibrated_with: The model that the slowdowns were measured with; empty where they hold for
            all, or nothing was measured.
        speed_log_sd: Standard deviation of the logarithm of measured over predicted decode speed
            that remains after calibration; None where nothing was measured.

    Raises:
        MachineError: The GPUs are not GPU0, GPU1, ... in this order, they are more than 16, or the
            RAM is not the CPU's. All faults are gathered.
    """

    gpus: tuple[Device, ...]
    ram: Device
    measured: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()
    compute: tuple[ComputeMeasurement, ...] = ()
    calibrated_with: str = ""
    speed_log_sd: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _devices_are_where_they_belong(self) -> Self:
        faults = [
            f"GPU {index} of the machine is {gpu.name!r} of kind {gpu.kind!r}: make it with "
            f"Device.gpu({index}, ...)"
            for index, gpu in enumerate(self.gpus)
            if (gpu.name, gpu.kind) != (f"GPU{index}", "gpu")
        ]
        if (self.ram.name, self.ram.kind) != ("CPU", "cpu"):
            faults.append(
                f"the machine's RAM is {self.ram.name!r} of kind {self.ram.kind!r}: make it with "
                "Device.ram(...)"
            )
        remote = [gpu.network is not None for gpu in self.gpus]
        if remote != sorted(remote, reverse=True):
            faults.append(
                "GPUs of other hosts come after those of this one, but llama.cpp has them first: "
                "put those with a network in front"
            )
        if len(self.gpus) > _MAX_GPUS:
            faults.append(
                f"the machine has {len(self.gpus)} GPUs, but llama.cpp takes at most {_MAX_GPUS}: "
                "leave some out"
            )
        if faults:
            raise MachineError(faults)
        return self

    @property
    def streaming_gpu(self) -> Device | None:
        """The GPU that large batches copy weights from RAM to, the first one of this host."""
        return next((gpu for gpu in self.gpus if gpu.network is None), None)

    def measured_compute(self, model: str, device: Device, predicted_bytes: int) -> int | None:
        """What was measured where a compute buffer was predicted to have so many bytes; else None.

        Args:
            model: What tells the model apart (``model_key``).
            device: Where the buffer is.
            predicted_bytes: The prediction.
        """
        key = (model, device.kind, predicted_bytes)
        found = (c for c in self.compute if (c.model, c.kind, c.predicted_bytes) == key)
        return next((c.measured_bytes for c in found), None)

    @property
    def endpoints(self) -> tuple[str, ...]:
        """Addresses of the servers that lend devices, for ``--rpc``."""
        found = (gpu.network.endpoint for gpu in self.gpus if gpu.network is not None)
        return tuple(dict.fromkeys(found))

    @property
    def devices(self) -> tuple[Device, ...]:
        """GPUs first, then the CPU."""
        return (*self.gpus, self.ram)

    @classmethod
    def parse(cls, text: str | os.PathLike[str], *, margin_bytes: int | None = None) -> Self:
        """Reads a machine from a line of text.

        The terms are joined by ``+``; the last one is the RAM. A GPU is a preset name
        (``RTX 4090``, ``24GiB``) or a capacity with a bandwidth (``24GiB@936GB/s``), with a count
        in front (``2x RTX 3090``). RAM is a capacity with a bandwidth, or a CPU's (``96GiB Ryzen 9
        9950X``); a RAM term alone is a machine without a GPU. A capacity behind a GPU's name is
        that of its memory: ``RTX 4090 48GiB``. ``RPC HOST:PORT`` before a GPU and ``@RATE,LATENCY``
        behind it make it one that another host lends (`quantplan.hardware.network.Network`); such
        GPUs come first, as in llama.cpp. The path of a file is that of a profile.

        Where a GPU shares the RAM (Apple's chips, Radeon 8060S, GB10), the last term is all the
        memory of the machine, ``M3 Max + 64GiB``, and its bandwidth may be left out. The GPU has
        the part that the system usually lets it have, or the capacity behind its name
        (``M3 Max 56GiB + 64GiB``), which must leave something; the rest is the RAM.

        Args:
            text: For example ``RTX 4090 + 64GiB@80GB/s``, ``2x RTX 3090 + 128GiB@200GB/s`` or
                ``M3 Max + 64GiB``.
            margin_bytes: Memory to leave free on every GPU, for the driver, its workspaces and
                whatever else runs there; by default 10 %, at most 1 GiB, which a desktop exceeds.

        Raises:
            MachineError: The text is not understood, has more than 16 GPUs, or several that share
                the RAM; the margin leaves nothing of a GPU. All faults of the terms are gathered;
                unknown GPUs come with similar names.
        """
        text = os.fspath(text)
        found = cls.load(Path(text)) if is_profile(text) else cls._described(text)
        return found if margin_bytes is None else found.with_margin(margin_bytes)

    @classmethod
    def _described(cls, text: str) -> Self:
        gpus, ram = parse_text(text)
        return cls(
            gpus=tuple(Device.of(i, gpu) for i, gpu in enumerate(gpus)),
            ram=Device.ram(
                ram.capacity_bytes,
                ram.bandwidth_bytes_per_s,
                model=ram.model,
                cores=ram.cores,
                shared_bytes=ram.shared_bytes,
            ),
            assumed=ram.assumed,
        )

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads a profile that `save` wrote.

        Raises:
            MachineError: The file cannot be read, or is no profile; every fault is named.
        """
        return read_saved(cls, path, "profile of a machine", MachineError)

    def with_margin(self, margin_bytes: int) -> Self:
        """The machine with so much memory left free on every GPU.

        Raises:
            MachineError: The number is negative, or leaves nothing of a GPU; all such are named.
        """
        faults = [
            f"a margin of {gib(margin_bytes)} leaves nothing of {gpu.name} ({gpu.model}), which "
            f"has {gib(gpu.capacity_bytes)}: leave less free, or the GPU out of the machine"
            for gpu in self.gpus
            if gpu.capacity_bytes <= margin_bytes
        ]
        if faults:
            raise MachineError(faults)
        margin = {"margin_bytes": margin_bytes}
        gpus = tuple(Device.model_validate(gpu.model_dump() | margin) for gpu in self.gpus)
        return self.model_copy(update={"gpus": gpus})

    def with_more(self, n_bytes: Mapping[str, int]) -> Self:
        """The machine with so many more bytes on devices, by their names, below 0 for fewer.

        Usual margins are those of the new sizes.
        """
        gpus = tuple(gpu.with_more(n_bytes.get(gpu.name, 0)) for gpu in self.gpus)
        before, after = (
            sum(gpu.capacity_bytes for gpu in every if gpu.shares_ram)
            for every in (self.gpus, gpus)
        )
        ram = self.ram.with_more(n_bytes.get(self.ram.name, 0), (before, after))
        return self.model_copy(update={"gpus": gpus, "ram": ram})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the machine as a profile, whole or not at all; ``--machine`` accepts it.

        Raises:
            InputError: The file cannot be written.
        """
        write_saved(self, path)

    def summary(self) -> str:
        """The devices, what was measured and assumed, and what that changed, in a few lines."""
        slowed = [device.slowdowns() for device in self.devices]
        said = [f"  measured: {text}" for text in self.measured]
        said += [f"  assumed: {text}" for text in self.assumed]
        if self.calibrated_with:
            said.append(f"  calibrated for: {self.calibrated_with}; less is known of other models")
        return "\n".join([self.describe(), *said, *(text for text in slowed if text)])

    def describe(self) -> str:
        """One line for people."""
        gpus = [
            f"{g.model} ({gib(g.capacity_bytes)}{f' at {g.network.endpoint}' if g.network else ''})"
            for g in self.gpus
        ]
        rate = gb_per_s(self.ram.bandwidth_bytes_per_s)
        return " + ".join([*gpus, f"RAM {gib(self.ram.capacity_bytes)} at {rate}"])

    def _table(self) -> Table:
        devices = self.devices
        return Table(
            "Devices",
            {
                "device": [d.name for d in devices],
                "model": [d.model for d in devices],
                "capacity_gib": [d.capacity_bytes / 2**30 for d in devices],
                "margin_gib": [d.margin_bytes / 2**30 for d in devices],
                "bandwidth_gb_per_s": [d.bandwidth_bytes_per_s / 1e9 for d in devices],
                "matrix_tflop_per_s": [d.flops_per_s / 1e12 for d in devices],
                "link_gb_per_s": [d.link_bytes_per_s / 1e9 for d in devices],
            },
        )

    def to_frame(self) -> Any:
        """The devices as a pandas data frame (or polars where only that is installed).

        Raises:
            MissingPackageError: Neither is installed.
        """
        return self._table().to_frame()

    def _repr_html_(self) -> str:
        return html_card(self.describe(), {}, self._table()._repr_html_(), notes=self.measured)
