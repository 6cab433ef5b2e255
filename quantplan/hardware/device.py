"""Something that holds tensors and reads them: a GPU, or the CPU with its RAM."""

from typing import Any, Literal, Self

from pydantic import Field, ValidationError, ValidationInfo, field_validator

from quantplan.errors import MachineError
from quantplan.hardware.network import Network
from quantplan.hardware.table import GpuSpec, is_unified, load_hardware, vendor_of
from quantplan.llama_cpp import Vendor
from quantplan.schema import Frozen, shortened


class MachineValue(Frozen):
    """A part of a machine's description: raises `MachineError` with every fault."""

    def __init__(self, **values: Any) -> None:
        """Turns what pydantic finds into sentences."""
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise MachineError(_faults(error)) from error


def _faults(error: ValidationError) -> list[str]:
    """Validation faults as sentences: one for all fields that are missing, one for the unknown."""
    fields: dict[str, list[str]] = {"missing": [], "extra_forbidden": []}
    said = []
    for fault in error.errors(include_url=False):
        where = " ".join(map(str, fault["loc"]))
        if fault["type"] in fields:
            fields[fault["type"]].append(where)
        else:
            said.append(f"machine {where}: {fault['msg']} (got {shortened(repr(fault['input']))})")
    if missing := fields["missing"]:
        said.append(f"the machine lacks {', '.join(missing)}")
    if unknown := fields["extra_forbidden"]:
        said.append(f"a machine has no {shortened(', '.join(unknown))}")
    return said


class Device(MachineValue):
    """Something that holds tensors and reads them.

    Attributes:
        name: ``GPU0``, ``GPU1``, ... or ``CPU`` (the RAM).
        kind: ``gpu`` or ``cpu``.
        model: What it is, for people.
        capacity_bytes: Memory in total.
        margin_bytes: Part of it that a plan must leave free (driver context, desktop, system).
        bandwidth_bytes_per_s: Memory bandwidth: a GPU's nominal one, and the RAM's as all cores
            measure it.
        flops_per_s: Half-precision matrix rate, for prefill; of a CPU the rate of its vector units.
        vector_flops_per_s: Single-precision rate of the ordinary units, which unpack quantized
            weights while decoding.
        link_bytes_per_s: Rate at which a GPU reads host memory; 0 for the CPU.
        decode_slowdown: Time that this device takes to decode, as measured here, over the time that
            the speed model predicts; 1 where nothing was measured.
        prefill_slowdown: The same for prefill.
        network: The way to it, where another host lends it (``ggml-rpc-server``); None for a device
            of this host.
        vendor: Whose GPU it is, by default that of the model in the table of known ones; None where
            that is not known. It says what ``-ot`` calls the GPU.

    Raises:
        MachineError: A number is out of range; all of them are named.
    """

    name: str
    kind: Literal["gpu", "cpu"]
    model: str
    capacity_bytes: int = Field(ge=0)
    margin_bytes: int = Field(ge=0)
    bandwidth_bytes_per_s: float = Field(gt=0, allow_inf_nan=False)
    flops_per_s: float = Field(gt=0, allow_inf_nan=False)
    vector_flops_per_s: float = Field(gt=0, allow_inf_nan=False)
    link_bytes_per_s: float = Field(ge=0, allow_inf_nan=False)
    decode_slowdown: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    prefill_slowdown: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    network: Network | None = None
    vendor: Vendor | None = Field(default=None, validate_default=True)

    @field_validator("vendor")
    @classmethod
    def _vendor_of_a_known_model(cls, value: Vendor | None, info: ValidationInfo) -> Vendor | None:
        return value or vendor_of(info.data.get("model", ""))

    @property
    def usable_bytes(self) -> int:
        """Capacity less margin."""
        return max(0, self.capacity_bytes - self.margin_bytes)

    @property
    def shares_ram(self) -> bool:
        """Whether it is a GPU whose memory is a part of this host's RAM."""
        return self.network is None and is_unified(self.model)

    def with_more(self, n_bytes: int, shared: tuple[int, int] = (0, 0)) -> Self:
        """The same device with so many more bytes; a margin that is the usual one grows with it.

        Args:
            n_bytes: How many more.
            shared: What GPUs have of the same memory before and after: a usual margin is of all.
        """
        kind: Literal["gpu", "ram"] = "gpu" if self.kind == "gpu" else "ram"
        capacity, margin = self.capacity_bytes + n_bytes, self.margin_bytes
        for before, after in ((0, 0), shared):
            if self.margin_bytes == _margin(self.capacity_bytes + before, kind):
                margin = _margin(capacity + after, kind)
        return self.model_copy(update={"capacity_bytes": capacity, "margin_bytes": margin})

    def slowdowns(self) -> str:
        """What calibration found, for people; empty where it found nothing."""
        parts = [
            f"{what} takes {factor:.2f} times as long as predicted"
            for what, factor in (
                ("decoding", self.decode_slowdown),
                ("prefill", self.prefill_slowdown),
            )
            if factor != 1.0
        ]
        return f"  {self.name}: {', '.join(parts)}" if parts else ""

    @classmethod
    def gpu(
        cls,
        index: int,
        capacity_bytes: int,
        bandwidth_bytes_per_s: float,
        *,
        model: str = "GPU",
        flops_per_s: float | None = None,
        vector_flops_per_s: float | None = None,
        link_bytes_per_s: float | None = None,
        margin_bytes: int | None = None,
        network: Network | None = None,
        vendor: Vendor | None = None,
    ) -> Self:
        """A GPU from plain numbers.

        Args:
            index: Position among the machine's GPUs, from 0.
            capacity_bytes: Memory in total.
            bandwidth_bytes_per_s: Nominal memory bandwidth.
            model: What it is, for people.
            flops_per_s: Half-precision matrix rate; by default in the RTX 3090's proportion to its
                bandwidth.
            vector_flops_per_s: Single-precision rate; by default a quarter of the matrix rate,
                as on GeForce cards.
            link_bytes_per_s: Host-to-device rate; by default PCIe 4.0 x16.
            margin_bytes: Memory to leave free; by default 10 %, at most 1 GiB.
            network: The way to it, where another host lends it.
            vendor: Whose it is; by default that of the model, where it is in the table.

        Raises:
            MachineError: A number is out of range; all of them are named.
        """
        defaults = load_hardware()["defaults"]
        flops = flops_per_s or bandwidth_bytes_per_s * defaults["gpu_flops_per_byte"]
        return cls(
            name=f"GPU{index}",
            kind="gpu",
            model=model,
            capacity_bytes=capacity_bytes,
            margin_bytes=_margin(capacity_bytes, "gpu") if margin_bytes is None else margin_bytes,
            bandwidth_bytes_per_s=bandwidth_bytes_per_s,
            flops_per_s=flops,
            vector_flops_per_s=vector_flops_per_s or flops * defaults["gpu_single_share"],
            link_bytes_per_s=link_bytes_per_s or defaults["link_gb_s"] * 1e9,
            network=network,
            vendor=vendor,
        )

    @classmethod
    def of(cls, index: int, spec: GpuSpec) -> Self:
        """A GPU from what is known of it; see `gpu`."""
        return cls.gpu(
            index,
            spec.capacity_bytes,
            spec.bandwidth_bytes_per_s,
            model=spec.model,
            flops_per_s=spec.flops_per_s,
            vector_flops_per_s=spec.vector_flops_per_s,
            link_bytes_per_s=spec.link_bytes_per_s,
            network=spec.network,
            vendor=spec.vendor,
        )

    @classmethod
    def ram(
        cls,
        capacity_bytes: int,
        bandwidth_bytes_per_s: float,
        *,
        model: str = "RAM",
        cores: int | None = None,
        margin_bytes: int | None = None,
        shared_bytes: int = 0,
    ) -> Self:
        """The CPU with its RAM.

        Args:
            capacity_bytes: Memory in total.
            bandwidth_bytes_per_s: Rate at which all cores read, as ``quantplan machine`` finds it;
                about four fifths of what the memory's channels offer on paper.
            model: What it is, for people.
            cores: Physical cores; by default as many as usually go with the bandwidth.
            margin_bytes: Memory to leave free; by default 5 % of all, at most 4 GiB: the system
                needs as much where a GPU shares the memory.
            shared_bytes: Part of the memory that is a GPU's, and not this device's.

        Raises:
            MachineError: A number is out of range; all of them are named.
        """
        defaults = load_hardware()["defaults"]
        flops = bandwidth_bytes_per_s * defaults["cpu_flops_per_byte"]
        if cores is not None:
            flops = cores * defaults["cpu_gflops_per_core"] * 1e9
        return cls(
            name="CPU",
            kind="cpu",
            model=model,
            capacity_bytes=capacity_bytes - shared_bytes,
            margin_bytes=_margin(capacity_bytes, "ram") if margin_bytes is None else margin_bytes,
            bandwidth_bytes_per_s=bandwidth_bytes_per_s,
            flops_per_s=flops,
            vector_flops_per_s=flops,
            link_bytes_per_s=0.0,
        )


def _margin(capacity_bytes: int, kind: Literal["gpu", "ram"]) -> int:
    defaults = load_hardware()["defaults"]
    share = max(0.0, capacity_bytes * float(defaults[f"{kind}_margin_share"]))
    return round(min(share, float(defaults[f"{kind}_margin_max_mib"]) * 2**20))
