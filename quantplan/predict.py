"""Memory of a given configuration: will this GGUF with these flags fit?"""

from collections.abc import Mapping, Sequence

from quantplan.costs import memory
from quantplan.formats.llama_args import parse_flags
from quantplan.hardware import Device, Machine
from quantplan.inventory import Inventory
from quantplan.placement import Launch, Placement, place
from quantplan.schema import Frozen
from quantplan.units import gib
from quantplan.workload import NEWEST_KNOWN_BUILD


class DeviceUse(Frozen):
    """What a plan puts on one device.

    Attributes:
        name: ``GPU0``, ..., ``CPU``.
        model: What the device is.
        capacity_bytes: Memory in total.
        margin_bytes: Memory that the plan leaves alone.
        weights_bytes: Model buffer as llama.cpp prints it; exact.
        padding_bytes: What a CUDA buffer takes on top of that.
        kv_bytes: KV cache and recurrent state; exact.
        compute_bytes: Compute buffer; an estimate unless it was measured.
        free_bytes: Capacity less all of the above but the margin.
        compute_is_measured: Whether llama.cpp itself said how large the compute buffer is.
    """

    name: str
    model: str
    capacity_bytes: int
    margin_bytes: int
    weights_bytes: int
    padding_bytes: int
    kv_bytes: int
    compute_bytes: int
    free_bytes: int
    compute_is_measured: bool = False


class MemoryPrediction(Frozen):
    """Memory that llama.cpp will take.

    Attributes:
        model: Name of the model.
        devices: What is on each device.
        fits: Whether every device holds its part and keeps its margin.
        warnings: Flags that do not do what they seem to say.
        notes: What was given but plays no part in the prediction.
    """

    model: str
    devices: tuple[DeviceUse, ...]
    fits: bool
    warnings: tuple[str, ...]
    notes: tuple[str, ...]

    def summary(self) -> str:
        """The prediction in a few lines of text."""
        rows = [f"{self.model}: {'fits' if self.fits else 'does NOT fit'}"]
        rows += [device_line(device) for device in self.devices]
        rows += [f"  warning: {text}" for text in self.warnings]
        rows += [f"  note: {text}" for text in self.notes]
        return "\n".join(rows)

    def with_measured_compute(self, compute_bytes: Mapping[str, int]) -> "MemoryPrediction":
        """The prediction with measured compute buffers in place of estimates.

        Args:
            compute_bytes: By name of the device; devices left out keep their estimate.
        """
        devices = tuple(
            use.model_copy(
                update={
                    "compute_bytes": compute_bytes[use.name],
                    "free_bytes": use.free_bytes + use.compute_bytes - compute_bytes[use.name],
                    "compute_is_measured": True,
                }
            )
            if use.name in compute_bytes
            else use
            for use in self.devices
        )
        fits = all(use.free_bytes >= use.margin_bytes for use in devices)
        return self.model_copy(update={"devices": devices, "fits": fits})


def device_line(use: DeviceUse) -> str:
    """One device as a line of text."""
    return (
        f"  {use.name:5} weights {gib(use.weights_bytes):>10}, KV {gib(use.kv_bytes):>9}, "
        f"compute {gib(use.compute_bytes):>9}{' (measured)' if use.compute_is_measured else ''}, "
        f"free {gib(use.free_bytes):>9} of {gib(use.capacity_bytes)}"
    )


def predict(
    inventory: Inventory,
    flags: str | Sequence[str],
    machine: Machine,
    *,
    llama_cpp_build: int = NEWEST_KNOWN_BUILD,
) -> MemoryPrediction:
    """Predicts the memory of a model that llama-server is started with.

    Weights and caches are exact; compute buffers are an estimate. Nothing is optimised.

    Args:
        inventory: The model, in the types that it has.
        flags: Flags of llama-server, as a command line or as arguments.
        machine: The devices; GPU n stands for ``CUDAn``, ``Vulkann`` and so on.
        llama_cpp_build: Build number of the llama.cpp, where builds differ.

    Raises:
        InputError: Flags that llama.cpp refuses or that contradict the machine.
        UnsupportedModelError: The memory of the architecture is not known.
    """
    launch = parse_flags(
        flags,
        context_length=inventory.architecture.context_length,
        llama_cpp_build=llama_cpp_build,
    )
    placement = place(inventory, machine, launch)
    uses = tuple(_use(inventory, launch, placement, machine, d) for d in machine.devices)
    return MemoryPrediction(
        model=inventory.name,
        devices=uses,
        fits=all(use.free_bytes >= use.margin_bytes for use in uses),
        warnings=placement.warnings,
        notes=launch.notes,
    )


def _use(
    inventory: Inventory, launch: Launch, placement: Placement, machine: Machine, device: Device
) -> DeviceUse:
    weights = padding = 0
    for name, homes in placement.tensors.items():
        tensor = inventory.by_name[name]
        copies = homes.count(device.name)
        weights += copies * memory.weight_bytes(tensor, tensor.qtype)
        if device.kind == "gpu":
            padding += copies * memory.cuda_padding_bytes(tensor, tensor.qtype)
    caches = memory.cache_bytes(inventory.architecture, launch.workload)
    cache = sum(n for n, home in zip(caches, placement.layers, strict=True) if home == device.name)
    compute = _compute_bytes(inventory, launch, placement, machine, device)
    return DeviceUse(
        name=device.name,
        model=device.model,
        capacity_bytes=device.capacity_bytes,
        margin_bytes=device.margin_bytes,
        weights_bytes=weights,
        padding_bytes=padding,
        kv_bytes=cache,
        compute_bytes=compute,
        free_bytes=device.capacity_bytes - weights - padding - cache - compute,
    )


def _compute_bytes(
    inventory: Inventory, launch: Launch, placement: Placement, machine: Machine, device: Device
) -> int:
    arch, workload = inventory.architecture, launch.workload
    if device.kind == "cpu":
        return memory.host_compute_bytes(arch, inventory.n_vocab, workload)
    streamed = 0
    if launch.op_offload and memory.streams(workload):
        streamed = max(
            (
                memory.weight_bytes(tensor, tensor.qtype)
                for name, homes in placement.tensors.items()
                for tensor in [inventory.by_name[name]]
                if tensor.layer is not None and machine.ram.name in homes
            ),
            default=0,
        )
    return memory.activation_bytes(arch, workload) + memory.scratch_bytes(
        inventory.n_vocab,
        workload,
        has_output=device.name == placement.output,
        streamed_bytes=streamed,
    )
