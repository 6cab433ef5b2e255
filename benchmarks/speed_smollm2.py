"""Predicts and measures the decode speed of SmolLM2 in several types, with the real llama.cpp.

Usage: python benchmarks/speed_smollm2.py

On the CPU alone, and with half of the layers on an RPC device, which is described as a GPU whose
memory is the RAM. The machine is measured first, and calibrated with the first type of each
placement; the table has the ratios of the other types to it, predicted and measured, as well as
predicted over measured speed. The files take turns, so that what else the machine does hits all.
"""

import argparse
import json
import sys
import tempfile
import urllib.request
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))

from quantplan import Device, Machine, Workload, read_inventory
from quantplan.costs.calibration import Measurement, calibrate
from quantplan.costs.decode import decode_s
from quantplan.costs.traffic import Traffic, collect
from quantplan.detect import detect
from quantplan.placement import Launch, place
from quantplan.quantize import quantize
from tests.support.llama_cpp import LlamaServer, llama_server, rpc_server
from tests.support.models import smollm2_f16
from tests.support.quantizer import recipe_for, spread

TYPES = ("Q8_0", "F16", "Q5_1", "Q5_0", "Q4_0", "IQ4_NL")
_TOKENS = 48
_REQUESTS = 3
_PROMPT = "The quick brown fox"


def decode_tps(server: LlamaServer) -> float:
    """Decode speed of one request, as llama-server states it."""
    body = {"prompt": _PROMPT, "n_predict": _TOKENS, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(  # noqa: S310 (loopback only)
        f"{server.url}/completion",
        data=json.dumps(body | {"cache_prompt": False}).encode(),
        headers={"Content-Type": "application/json"},
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=300) as response:
        return float(json.load(response)["timings"]["predicted_per_second"])


def traffic_of(path: Path, machine: Machine, n_gpu_layers: int) -> Traffic:
    """What a token of a file makes the devices do."""
    inventory = read_inventory(path)
    placement = place(
        inventory, machine, Launch(n_gpu_layers=n_gpu_layers, workload=Workload(context=512))
    )
    by_name = inventory.by_name
    assignment = {n: (by_name[n].qtype, homes[0]) for n, homes in placement.tensors.items()}
    return collect(inventory, assignment, placement.layers, placement.output)


def measure(paths: Sequence[Path], n_gpu_layers: int, repeats: int) -> list[float]:
    """Median decode speed of each file; one server each at a time, in turns."""
    speeds: list[list[float]] = [[] for _ in paths]
    flags = ["-c", "512", "-np", "1", "-fit", "off", "-ngl", str(n_gpu_layers)]
    for _ in range(repeats):
        for path, found in zip(paths, speeds, strict=True):
            with ExitStack() as running:
                rpc = [running.enter_context(rpc_server(2))] if n_gpu_layers else []
                server = running.enter_context(llama_server(path, [*flags, "-t", "2"], rpc))
                decode_tps(server)  # the first request warms up
                found += [decode_tps(server) for _ in range(_REQUESTS)]
    return [median(found) for found in speeds]


def compare(
    name: str, machine: Machine, paths: Sequence[Path], n_gpu_layers: int, repeats: int
) -> None:
    """Prints predicted beside measured for one placement."""
    traffics = [traffic_of(path, machine, n_gpu_layers) for path in paths]
    measured = measure(paths, n_gpu_layers, repeats)
    workload, depth = Workload(context=512), _TOKENS / 2
    raw = [1 / decode_s(t, machine, workload, depth) for t in traffics]
    known = calibrate(machine, [Measurement(traffics[0], workload, depth, measured[0])])
    after = [1 / decode_s(t, known, workload, depth) for t in traffics]
    print(f"{name}: {machine.describe()}")
    print(f"{'type':<8}{'tokens/s':>9}{'over ' + TYPES[0]:>11}{'predicted':>11}"
          f"{'pred/meas':>11}{'calibrated':>11}")  # fmt: skip
    for qtype, tps, one, two in zip(TYPES, measured, raw, after, strict=True):
        print(
            f"{qtype:<8}{tps:>9.1f}{tps / measured[0]:>11.2f}{one / raw[0]:>11.2f}"
            f"{one / tps:>11.2f}{two / tps:>11.2f}",
            flush=True,
        )


def main() -> None:
    """Quantizes, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=1, help="servers started per type")
    options = parser.parse_args()
    here = detect()
    remote = Device.gpu(
        0,
        here.ram.capacity_bytes // 2,
        here.ram.bandwidth_bytes_per_s,
        model="RPC device",
        flops_per_s=here.ram.flops_per_s,
        vector_flops_per_s=here.ram.vector_flops_per_s,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = smollm2_f16(folder)
        paths = [source if t == "F16" else folder / f"{t}.gguf" for t in TYPES]
        for qtype, path in zip(TYPES, paths, strict=True):
            if path != source:
                quantize(
                    recipe_for(source, dict.fromkeys(spread(source, ["Q8_0"]), qtype)), source, path
                )
        compare("CPU only", here, paths, 0, options.repeats)
        split = Machine(gpus=(remote,), ram=here.ram, measured=here.measured)
        compare("half on an RPC device", split, paths, 15, options.repeats)


if __name__ == "__main__":
    main()
