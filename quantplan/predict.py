"""Memory of a given configuration: will this GGUF with these flags fit?"""

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from quantplan.configuration import Configuration, Resolved, resolve
from quantplan.costs.calibration import for_model, model_key
from quantplan.costs.compute import (
    BytesEstimate,
    Work,
    estimate,
    n_input_copies,
    streamed_bytes,
    streams,
)
from quantplan.costs.host import is_repacked, mapped_bytes
from quantplan.costs.ik_caches import COMPACTS_WINDOWS, derived_weight_bytes
from quantplan.costs.speed import SpeedEstimate, SpeedPrediction, predict_speed
from quantplan.display import Table, html_card
from quantplan.formats.args_notes import kernel_notes, prompt_cache_notes
from quantplan.given import check_given
from quantplan.hardware.device import Device
from quantplan.hardware.machine import Machine
from quantplan.inventory import Inventory
from quantplan.llama_cpp import NEWEST_KNOWN_BUILD
from quantplan.parts import Part, all_parts
from quantplan.qtypes import Runtime, qtype
from quantplan.schema import Frozen
from quantplan.units import GIB, gib
from quantplan.workload import Workload

# Speeds from here on are shown without a decimal.
_WHOLE_TPS = 100
# Of a line of text behind its indent, so that it fits 80 columns.
_MAX_WIDTH = 78


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
        compute_low_bytes: Low end of the estimate: in 5 % of the cases it is smaller.
        compute_high_bytes: High end of the estimate: in 5 % of the cases it is larger.
        free_bytes: Capacity less weights, padding, KV and the high end of the compute buffer.
        compute_is_measured: Whether llama.cpp itself said how large the compute buffer is.
        repacked_bytes: Weights among them that the CPU copies out of the mapped file into another
            layout; 0 where no file is mapped.
        mapped_bytes: Length of the mapped file from the first to the last tensor in RAM, as
            llama.cpp prints it; exact, None where no file is mapped or its order is not known.
    """

    name: str
    model: str
    capacity_bytes: int
    margin_bytes: int
    weights_bytes: int
    padding_bytes: int
    kv_bytes: int
    compute_bytes: int
    compute_low_bytes: int
    compute_high_bytes: int
    free_bytes: int
    compute_is_measured: bool = False
    repacked_bytes: int = 0
    mapped_bytes: int | None = None


class MemoryPrediction(Frozen):
    """Memory that llama.cpp will take.

    Attributes:
        model: Name of the model.
        devices: What is on each device.
        fits: Whether every device holds its part and keeps its margin.
        speed: Decode and prefill speed over the depth of the context, with 80 % intervals; without
            a draft model or multi-token prediction.
        warnings: Flags that do not do what they seem to say.
        notes: What was given but plays no part in the prediction.
    """

    model: str
    devices: tuple[DeviceUse, ...]
    fits: bool
    speed: SpeedPrediction
    warnings: tuple[str, ...]
    notes: tuple[str, ...]

    def summary(self) -> str:
        """The prediction in a few lines of text."""
        rows = [f"{self.model}: {'fits' if self.fits else 'does NOT fit'}"]
        rows += [device_line(device) for device in self.devices]
        rows += speed_lines(self.speed)
        rows += [f"  warning: {text}" for text in self.warnings]
        rows += [f"  note: {text}" for text in self.notes]
        return "\n".join(rows)

    def to_frame(self) -> Any:
        """The devices as a pandas data frame (or polars where only that is installed).

        Raises:
            MissingPackageError: Neither is installed.
        """
        return device_table(self.devices).to_frame()

    def _repr_html_(self) -> str:
        title = f"{self.model}: {'fits' if self.fits else 'does NOT fit'}"
        said = [f"warning: {text}" for text in self.warnings] + list(self.notes)
        devices = device_table(self.devices)._repr_html_()
        return html_card(title, speed_facts(self.speed), devices, notes=said)

    def with_measured_compute(self, compute_bytes: Mapping[str, int]) -> "MemoryPrediction":
        """The prediction with measured compute buffers in place of estimates.

        Args:
            compute_bytes: By name of the device; devices left out keep their estimate.
        """
        devices = tuple(
            use.model_copy(
                update={
                    "compute_bytes": compute_bytes[use.name],
                    "compute_low_bytes": compute_bytes[use.name],
                    "compute_high_bytes": compute_bytes[use.name],
                    "free_bytes": use.free_bytes + use.compute_high_bytes - compute_bytes[use.name],
                    "compute_is_measured": True,
                }
            )
            if use.name in compute_bytes
            else use
            for use in self.devices
        )
        fits = all(use.free_bytes >= use.margin_bytes for use in devices)
        return self.model_copy(update={"devices": devices, "fits": fits})


def device_table(devices: Sequence[DeviceUse]) -> Table:
    """What is on each device."""
    return Table(
        "Memory",
        {
            "device": [use.name for use in devices],
            "model": [use.model for use in devices],
            **{
                f"{what}_gib": [getattr(use, f"{what}_bytes") / GIB for use in devices]
                for what in ("capacity", "weights", "kv", "compute", "compute_high", "free")
            },
        },
    )


def device_line(use: DeviceUse) -> str:
    """One device as a line of text, in GiB."""
    weights, kv, free, capacity = (
        f"{n_bytes / GIB:.2f}"
        for n_bytes in (use.weights_bytes, use.kv_bytes, use.free_bytes, use.capacity_bytes)
    )
    words = (
        f"{use.name:5} weights {weights:>6}, KV {kv:>5}, compute {_compute_text(use)}, "
        f"free {free:>6} of {capacity} GiB"
    )
    # Of a machine with a lot of RAM it would be wider than a terminal.
    return f"  {words if len(words) <= _MAX_WIDTH else ' '.join(words.split())}"


def speed_lines(speed: SpeedPrediction) -> list[str]:
    """Speed with an empty and with a full context as lines of text."""
    ends = (speed.points[0], speed.points[-1])
    return [
        f"  {what} tokens/s: "
        + ", ".join(f"{_interval_text(getattr(p, name))} at depth {p.depth}" for p in ends)
        for what, name in (("decode", "decode_tps"), ("prefill", "prefill_tps"))
    ]


def speed_facts(speed: SpeedPrediction) -> dict[str, str]:
    """The same by what they are about."""
    lines = [line.strip().partition(": ") for line in speed_lines(speed)]
    return {what: said for what, _, said in lines}


def _interval_text(tps: SpeedEstimate) -> str:
    digits = 0 if tps.expected >= _WHOLE_TPS else 1
    return f"{tps.expected:.{digits}f} ({tps.low:.{digits}f} to {tps.high:.{digits}f})"


def _compute_text(use: DeviceUse) -> str:
    if use.compute_is_measured:
        return f"{use.compute_bytes / GIB:.2f} (measured)"
    return f"{use.compute_low_bytes / GIB:.2f} to {use.compute_high_bytes / GIB:.2f}"


def predict(
    inventory: Inventory,
    configuration: Configuration,
    machine: Machine,
    workload: Workload | None = None,
    *,
    engine: Runtime = "llama.cpp",
    engine_date: datetime.date | None = None,
    llama_cpp_build: int = NEWEST_KNOWN_BUILD,
    draft: Inventory | None = None,
    projector: Inventory | None = None,
) -> MemoryPrediction:
    """Predicts the memory of a model that llama-server is started with.

    Weights and caches are exact; compute buffers are an estimate. Nothing is optimised.

    Args:
        inventory: The model; a plan, recipe or assignment may change its types.
        configuration: How it is run: flags of llama-server as a command line or as arguments; a
            plan or recipe; or type and device of every tensor, as a mapping from its name or as
            assignments. In the last case a layer's KV cache is where its attention is.
        machine: The devices; GPU n stands for ``CUDAn``, ``Vulkann`` and so on.
        workload: Context, slots, batch and KV types where single devices are given; flags, plans
            and recipes state theirs.
        engine: Whose flags they are.
        engine_date: Day of ik_llama.cpp's sources, which has no releases by number and whose
            defaults changed; None for the newest.
        llama_cpp_build: Build number of the llama.cpp, where builds differ. Plans and recipes
            state theirs.
        draft: The draft model; by default read from ``-md`` where that file is here.
        projector: The multimodal projector; by default read from ``-mm``.

    Raises:
        InputError: Flags that the engine refuses or that contradict the machine; tensors, types or
            devices that do not exist; a workload beside flags.
        UnsupportedModelError: The memory of the architecture is not known.
    """
    check_given(("model", inventory, Inventory), ("machine", machine, Machine))
    resolved = resolve(
        inventory,
        configuration,
        machine,
        workload,
        engine=engine,
        engine_date=engine_date,
        llama_cpp_build=llama_cpp_build,
    )
    return predict_resolved(resolved, machine, draft=draft, projector=projector)


def predict_resolved(
    resolved: Resolved,
    machine: Machine,
    *,
    draft: Inventory | None = None,
    projector: Inventory | None = None,
) -> MemoryPrediction:
    """Predicts the memory of a configuration that is worked out already; see `predict`."""
    parts, notes = all_parts(resolved, machine, draft, projector)
    uses = tuple(_use(resolved, parts, machine, device) for device in machine.devices)
    launch = resolved.launch
    return MemoryPrediction(
        model=resolved.inventory.name,
        devices=uses,
        fits=all(use.free_bytes >= use.margin_bytes for use in uses),
        speed=_speed(resolved, machine),
        warnings=(*launch.warnings, *resolved.placement.warnings, *_foreign_types(resolved)),
        notes=(
            *launch.notes,
            *notes,
            *_type_notes(resolved.inventory),
            *_network_notes(launch.endpoints, machine),
            *_host_notes(uses[-1]),
            *prompt_cache_notes(
                uses[-1].free_bytes - uses[-1].margin_bytes,
                launch.prompt_cache_mib,
                launch.workload.llama_cpp_build,
            ),
            *_ik_notes(resolved),
            *_kernel_notes(resolved, machine),
        ),
    )


def _speed(resolved: Resolved, machine: Machine) -> SpeedPrediction:
    inventory, launch, placement = resolved.inventory, resolved.launch, resolved.placement
    types = inventory.by_name
    return predict_speed(
        inventory,
        {name: (types[name].qtype, homes[0]) for name, homes in placement.tensors.items()},
        placement.layers,
        placement.output,
        machine=for_model(machine, inventory.architecture),
        workload=launch.workload,
        caches=placement.caches,
        runtime="llama.cpp" if launch.ik is None else "ik_llama.cpp",
        op_offload=launch.op_offload,
    )


def _use(resolved: Resolved, parts: Sequence[Part], machine: Machine, device: Device) -> DeviceUse:
    weights, padding = (sum(n) for n in zip(*(p.weights_on(device) for p in parts), strict=True))
    cache = sum(part.caches_on(device) for part in parts)
    inventory, launch, placement = resolved.inventory, resolved.launch, resolved.placement
    compute = compute_buffer(resolved, machine, device)
    is_mapped = device.kind == "cpu" and launch.maps_file
    repacked = _repacked(resolved, machine) if is_mapped else set()
    # The copy of a tied embedding may be repacked, but its rows are read where they are.
    in_file = {
        name
        for name, homes in placement.tensors.items()
        if device.name in homes and (name not in repacked or len(homes) > 1)
    }
    return DeviceUse(
        name=device.name,
        model=device.model,
        capacity_bytes=device.capacity_bytes,
        margin_bytes=device.margin_bytes,
        weights_bytes=weights,
        padding_bytes=padding,
        kv_bytes=cache,
        compute_bytes=compute.expected,
        compute_low_bytes=compute.low,
        compute_high_bytes=compute.high,
        free_bytes=device.capacity_bytes - weights - padding - cache - compute.high,
        compute_is_measured=0 < compute.low == compute.high,
        repacked_bytes=sum(inventory.by_name[name].n_bytes for name in repacked),
        mapped_bytes=mapped_bytes(inventory, in_file) if is_mapped else None,
    )


def _repacked(resolved: Resolved, machine: Machine) -> set[str]:
    """Names of the tensors that the CPU copies out of the mapped file."""
    if machine.gpus or not resolved.launch.repacks:
        return set()
    homes = resolved.placement.tensors
    loaded = (tensor for tensor in resolved.inventory.tensors if tensor.name in homes)
    return {tensor.name for tensor in loaded if is_repacked(tensor, len(homes[tensor.name]))}


def _type_notes(inventory: Inventory) -> list[str]:
    """Says that no matrix is quantized, as in the catalog, where a mix of it may be meant."""
    types = sorted({tensor.qtype for tensor in inventory.tensors if tensor.is_quantizable})
    if not types or not all(qtype(name).is_float for name in types):
        return []
    return [
        f"this is the unquantized model, in {', '.join(types)}: --ftype Q4_K_M (stock_mix in "
        "Python) or a recipe gives it other types"
    ]


def _network_notes(endpoints: Sequence[str], machine: Machine) -> list[str]:
    """Names servers of ``--rpc`` whose devices are not the machine's, and so not counted."""
    unknown = [endpoint for endpoint in endpoints if endpoint not in machine.endpoints]
    if not unknown:
        return []
    return [
        f"--rpc {','.join(unknown)}: the machine has no device there, so none is counted; say what "
        f"it is, such as RPC {unknown[0]} RTX 3090@1Gbit/s,0.2ms + ..."
    ]


def _host_notes(ram: DeviceUse) -> list[str]:
    notes = []
    if ram.repacked_bytes:
        notes.append(
            f"{gib(ram.repacked_bytes)} of the weights are repacked (by x86 CPUs with AVX2) out of "
            "the mapped file, whose pages the system can drop then; -lm none reads them once"
        )
    if ram.mapped_bytes and ram.mapped_bytes > ram.weights_bytes - ram.repacked_bytes:
        notes.append(
            f"llama.cpp prints {gib(ram.mapped_bytes)} for the mapped file: from the first to the "
            "last tensor in RAM, with those of the GPUs in between"
        )
    return notes


def _ik_notes(resolved: Resolved) -> list[str]:
    launch, architecture = resolved.launch, resolved.inventory.architecture
    notes: list[str] = []
    if launch.ik is None:
        return notes
    n_bytes = derived_weight_bytes(architecture) if launch.ik.mla else 0
    if n_bytes:
        notes.append(
            f"-mla {launch.ik.mla}: ik_llama.cpp derives weights while it loads, up to "
            f"{gib(n_bytes)} on the devices of the attention, which are not counted"
        )
    has_windows = any(cache.window for cache in architecture.caches)
    if launch.ik.swa_compress and has_windows and architecture.name not in COMPACTS_WINDOWS:
        notes.append(f"--swa-compress is not known to work for {architecture.name}; not counted")
    return notes


def _kernel_notes(resolved: Resolved, machine: Machine) -> tuple[str, ...]:
    launch, caches = resolved.launch, set(resolved.placement.caches)
    if launch.ik is not None or caches == {machine.ram.name}:
        return ()
    return kernel_notes(launch.workload, machine)


def _foreign_types(resolved: Resolved) -> list[str]:
    engine: Runtime = "llama.cpp" if resolved.launch.ik is None else "ik_llama.cpp"
    types = {tensor.qtype for tensor in resolved.inventory.tensors}
    foreign = sorted(name for name in types if engine not in qtype(name).runtimes)
    if not foreign:
        return []
    return [f"{engine} does not load tensors of the types {', '.join(foreign)}"]


def compute_buffer(resolved: Resolved, machine: Machine, device: Device) -> BytesEstimate:
    """The compute buffer of one device."""
    inventory, launch, placement = resolved.inventory, resolved.launch, resolved.placement
    architecture = inventory.architecture
    if launch.split_mode == "none" and machine.gpus:  # llama.cpp uses no other GPU
        machine = machine.model_copy(update={"gpus": (machine.gpus[launch.main_gpu],)})
    if device not in machine.devices:
        return BytesEstimate(low=0, expected=0, high=0)
    experts = (
        homes for name, homes in placement.tensors.items() if inventory.by_name[name].is_expert
    )
    work = Work(
        device_kind=device.kind,
        has_layers=device.name in placement.caches,
        has_experts=any(device.name in homes for homes in experts),
        has_output=device.name == placement.output,
        streamed_bytes=streamed_bytes(inventory, launch, placement, machine)
        if device == machine.streaming_gpu
        else 0,
        n_input_copies=n_input_copies(launch, placement, machine),
        is_first=device == machine.devices[0],
        streams=device == machine.streaming_gpu and streams(launch),
    )
    found = estimate(architecture, inventory.n_vocab, launch, work)
    known = machine.measured_compute(model_key(architecture), device, found.expected)
    return found if known is None else BytesEstimate(low=known, expected=known, high=known)
