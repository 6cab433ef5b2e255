"""What a solution comes to: types and places of tensors, flags, memory, speed and loss."""

from dataclasses import dataclass, replace
from functools import cached_property

from quantplan.configuration import resolve
from quantplan.costs.memory import pad
from quantplan.costs.prefill import prefill_s
from quantplan.costs.quality import LossTable, kld_nats
from quantplan.costs.speed import SpeedPrediction, predict_traffic
from quantplan.costs.traffic import Traffic, collect
from quantplan.formats.llama_cpp import buffer_types, placement_flags, rpc_flags, workload_flags
from quantplan.hardware.machine import Machine
from quantplan.planner.problem import Problem
from quantplan.planner.solution import DeviceBytes, Solution
from quantplan.predict import DeviceUse, compute_buffer
from quantplan.recipe import Prediction, RecipeTensor

_DATA_ALIGNMENT = 32


@dataclass(frozen=True)
class Outcome:
    """A solution in the words of llama.cpp and of a plan.

    Attributes:
        machine: All devices that there are; the problem's are those that are used.
        problem: What was solved.
        solution: Its solution.
    """

    machine: Machine
    problem: Problem
    solution: Solution

    @cached_property
    def tensors(self) -> tuple[RecipeTensor, ...]:
        """Type and device of every tensor, in file order."""
        problem = self.problem
        chosen: dict[str, tuple[str, str]] = {}
        for group, (option, device) in zip(problem.groups, self.solution.choices, strict=True):
            for tensor, name in zip(group.tensors, option.qtypes, strict=True):
                chosen[tensor.name] = name, device
        entries = []
        for tensor in problem.inventory.tensors:
            if tensor.name in chosen:
                qtype, home = chosen[tensor.name]
                entry = RecipeTensor(
                    tensor=tensor.name, qtype=qtype, device=home, shape_ne=tensor.shape_ne
                )
            else:  # not loaded, so nothing was chosen
                usual = problem.policy.candidates_for(tensor, is_loaded=False)[0]
                entry = RecipeTensor(
                    tensor=tensor.name, qtype=usual, device=None, shape_ne=tensor.shape_ne
                )
            entries.append(entry)
        return tuple(entries)

    @cached_property
    def placed(self) -> dict[str, tuple[str, str]]:
        """Type and device name of each loaded tensor."""
        return {t.tensor: (t.qtype, t.device) for t in self.tensors if t.device is not None}

    @cached_property
    def flags(self) -> tuple[str, ...]:
        """Flags for llama.cpp, one argument each."""
        problem, solution = self.problem, self.solution
        moved = {
            tensor.name: name
            for group, (_, name) in zip(problem.groups, solution.choices, strict=True)
            if group.place == "free" and name != solution.layer_devices[group.layer or 0]
            for tensor in group.tensors
        }
        is_single = len(problem.machine.gpus) == 1
        placement = placement_flags(
            n_layers=problem.inventory.architecture.n_layers,
            layer_devices=solution.layer_devices,
            output_device=problem.output_device.name,
            buffers=buffer_types(problem.machine if is_single else self.machine),
            moved=moved,
            others=[t.name for t in problem.inventory.tensors if t.name not in moved],
        )
        if is_single and len(self.machine.gpus) > 1:
            placement += ["-sm", "none", "-mg", "0"]
        return (*rpc_flags(self.machine), *placement, *workload_flags(problem.workload))

    @cached_property
    def devices(self) -> tuple[DeviceUse, ...]:
        """What is on each device; compute buffers are those of the flags, at most the planned."""
        build = self.problem.workload.llama_cpp_build
        written = self.problem.inventory.with_qtypes({t.tensor: t.qtype for t in self.tensors})
        resolved = resolve(written, self.flags, self.machine, llama_cpp_build=build)
        uses = []
        for device in self.machine.devices:
            used = self.solution.device_bytes.get(device.name, DeviceBytes.none())
            compute = compute_buffer(resolved, self.machine, device)
            held = used.weights + used.padding + used.cache
            uses.append(
                DeviceUse(
                    name=device.name,
                    model=device.model,
                    capacity_bytes=device.capacity_bytes,
                    margin_bytes=device.margin_bytes,
                    weights_bytes=used.weights,
                    padding_bytes=used.padding,
                    kv_bytes=used.cache,
                    compute_bytes=compute.expected,
                    compute_low_bytes=compute.low,
                    compute_high_bytes=compute.high,
                    free_bytes=device.capacity_bytes - held - compute.high,
                )
            )
        return tuple(uses)

    @cached_property
    def expected_losses(self) -> LossTable:
        """The losses to expect, also where the plan was made against their upper end."""
        evidence = self.problem.evidence
        return LossTable(self.problem.inventory, evidence and replace(evidence, upper_sds=0.0))

    @cached_property
    def _traffic(self) -> Traffic:
        problem, layers = self.problem, self.solution.layer_devices
        return collect(problem.inventory, self.placed, layers, problem.output_device.name)

    @cached_property
    def speed(self) -> SpeedPrediction:
        """Decode and prefill speed over the depth of the context."""
        return predict_traffic(self._traffic, self.machine, self.problem.workload)

    @cached_property
    def predicted(self) -> Prediction:
        """Speed, loss and size."""
        inventory, work = self.problem.inventory, self.problem.workload
        prompt_s = prefill_s(self._traffic, self.problem.machine, work, 0)
        turn = work.prompt_tokens, work.answer_tokens
        has_room = 0 < sum(turn) <= work.context
        file_bytes = sum(
            pad(tensor.bytes_as(entry.qtype), _DATA_ALIGNMENT)
            for tensor, entry in zip(inventory.tensors, self.tensors, strict=True)
        )
        evidence = self.problem.evidence
        is_upper = evidence is not None and evidence.upper_sds > 0
        types = {entry.tensor: entry.qtype for entry in self.tensors}
        return Prediction(
            decode_tps=1 / self.solution.decode_s,
            prefill_tps=work.ubatch / prompt_s,
            turn_s=self.speed.turn_s(*turn).expected if has_room else None,
            loss_nats=self.expected_losses.model_kld_nats(types),
            upper_loss_nats=kld_nats(self.solution.loss_nats) if is_upper else None,
            file_bytes=file_bytes,
            bpw=file_bytes * 8 / inventory.n_weights,
        )
