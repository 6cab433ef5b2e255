"""Predicts and measures the decode speed of SmolLM2 in several types, with the real llama.cpp.

Usage: python benchmarks/speed_smollm2.py

On the CPU alone, and with half of the layers on an RPC device, which is another core of the same
CPU that llama.cpp takes for a GPU. One thread works, and its CPU time is counted, so that what else
the machine does matters little. The table has the ratios to the first type, measured and predicted,
and what is predicted over measured once the first type has calibrated the machine.
"""

import argparse
import json
import sys
import tempfile
import urllib.request
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from quantplan import Device, Machine, Workload, read_inventory
from quantplan.costs.calibration import Measurement, calibrate
from quantplan.costs.decode import decode_s
from quantplan.costs.traffic import Traffic, collect
from quantplan.hardware.detect import detect
from quantplan.placement import Launch, place
from quantplan.quantize import quantize
from quantplan.runtime.process import ADDRESS
from tests.support.llama_cpp import LlamaServer, llama_server, rpc_server
from tests.support.models import smollm2_f16
from tests.support.quantizer import recipe_for, spread

TYPES = ("Q8_0", "F16", "Q5_1", "Q5_0", "Q4_0", "IQ4_NL")
_SHORT, _TOKENS = 4, 48
_PROMPT = "The quick brown fox"


def answer(server: LlamaServer, n_tokens: int) -> None:
    """Lets a server generate so many tokens."""
    body = {"prompt": _PROMPT, "n_predict": n_tokens, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"http://{ADDRESS}:{server.port}/completion",
        data=json.dumps(body | {"cache_prompt": False}).encode(),
        headers={"Content-Type": "application/json"},
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=300) as response:
        response.read()


def cpu_s() -> float:
    """CPU seconds that the servers which this process started have used so far."""
    times = [child.cpu_times() for child in psutil.Process().children()]
    return float(sum(t.user + t.system for t in times))


def decode_tps(server: LlamaServer) -> float:
    """Tokens per second of CPU time: what a long answer takes beyond a short one.

    With one thread at work that is the speed of a machine that does nothing else.
    """
    answer(server, _SHORT)  # warms up
    marks = [cpu_s()]
    for n_tokens in (_SHORT, _SHORT + _TOKENS):
        answer(server, n_tokens)
        marks.append(cpu_s())
    return _TOKENS / ((marks[2] - marks[1]) - (marks[1] - marks[0]))


def traffic_of(path: Path, machine: Machine, n_gpu_layers: int) -> Traffic:
    """What a token of a file makes the devices do."""
    inventory = read_inventory(path)
    placement = place(
        inventory, machine, Launch(n_gpu_layers=n_gpu_layers, workload=Workload(context=512))
    )
    by_name = inventory.by_name
    assignment = {n: (by_name[n].qtype, homes[0]) for n, homes in placement.tensors.items()}
    return collect(inventory, assignment, placement.layers, placement.output)


def measure(path: Path, n_gpu_layers: int) -> float:
    """Decode speed of a file with one thread."""
    flags = ["-c", "512", "-np", "1", "-fit", "off", "-ngl", str(n_gpu_layers), "-t", "1"]
    with ExitStack() as running:
        rpc = [running.enter_context(rpc_server(1))] if n_gpu_layers else []
        return decode_tps(running.enter_context(llama_server(path, flags, rpc)))


def compare(name: str, machine: Machine, paths: Sequence[Path], n_gpu_layers: int) -> None:
    """Prints predicted beside measured for one placement."""
    workload, depth = Workload(context=512), _TOKENS / 2
    print(f"{name}: {machine.describe()}")
    print(f"{'type':<8}{'tokens/s':>9}{'over ' + TYPES[0]:>11}{'predicted':>11}{'calibrated':>11}")
    known, first, first_raw = machine, 0.0, 0.0
    for qtype, path in zip(TYPES, paths, strict=True):
        traffic, tps = traffic_of(path, machine, n_gpu_layers), measure(path, n_gpu_layers)
        raw = 1 / decode_s(traffic, machine, workload, depth)
        if not first:
            first, first_raw = tps, raw
            known = calibrate(machine, [Measurement(traffic, workload, depth, tps)])
        calibrated = 1 / decode_s(traffic, known, workload, depth)
        print(
            f"{qtype:<8}{tps:>9.1f}{tps / first:>11.2f}{raw / first_raw:>11.2f}"
            f"{calibrated / tps:>11.2f}",
            flush=True,
        )


def main() -> None:
    """Quantizes, measures and prints."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    found = detect()
    here = Machine(
        gpus=(),
        ram=Device.ram(found.ram.capacity_bytes, found.ram.bandwidth_bytes_per_s, cores=1),
    )
    # It computes as the CPU does, so what GPUs' kernels cost does not count.
    remote = here.ram.model_copy(update={"name": "GPU0", "model": "RPC device"})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = smollm2_f16(folder)
        paths = [source if t == "F16" else folder / f"{t}.gguf" for t in TYPES]
        for qtype, path in zip(TYPES, paths, strict=True):
            if path != source:
                quantize(
                    recipe_for(source, dict.fromkeys(spread(source, ["Q8_0"]), qtype)), source, path
                )
        compare("CPU only", here, paths, 0)
        split = Machine.model_construct(gpus=(remote,), ram=here.ram)  # a CPU among the GPUs
        compare("half on an RPC device", split, paths, 15)


if __name__ == "__main__":
    main()
