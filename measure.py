"""Seconds and memory, measured so that a busy machine or another system does not change what they say, and on what."""

import gc
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own messages are not for the reader of a table

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from models import pick_device


def finish(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def forward_flop(network, side: int) -> int:
    """Floating-point operations of a network's forward pass for one image of that side, two for a multiply-add."""
    from torch.utils.flop_counter import FlopCounterMode  # here: training does without it, and starts sooner

    plainly = sdpa_kernel(SDPBackend.MATH)  # attention's own kernels on a CPU are not counted
    with FlopCounterMode(display=False) as counter, plainly, torch.no_grad():
        network(torch.zeros(2, 3, side, side))  # BatchNorm in training mode wants two
    return counter.get_total_flops() // 2


def in_turn(what: dict[str, object], device: torch.device, repeats: int, warm: int = 2) -> dict[str, list[float]]:
    """Seconds of each call, round after round: whatever else slows the machine slows all of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in what}
    for turn in range(warm + repeats):
        for name, call in what.items():
            finish(device)
            started = time.perf_counter()
            call()
            finish(device)
            if turn >= warm:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, other: str) -> dict[str, float]:
    """How many times as long `name` takes: the median over rounds, and the quartiles."""
    each = [a / b for a, b in zip(seconds[name], seconds[other])]
    low, middle, high = statistics.quantiles(each, n=4) if len(each) > 1 else each * 3
    return {"ratio": round(middle, 3), "low": round(low, 3), "high": round(high, 3)}


def median(seconds: list[float]) -> float:
    return round(statistics.median(seconds), 5)


def peak_memory(call, device: torch.device) -> float:
    """MiB of tensors that a call makes and holds at its peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    with tempfile.TemporaryDirectory() as folder:
        seen.export_chrome_trace(f"{folder}/trace.json")
        trace = json.loads(Path(folder, "trace.json").read_text(errors="replace"))["traceEvents"]
    moves = sorted((e for e in trace if e["name"] == "[memory]"), key=lambda e: e["ts"])
    held, now, peak = {}, 0, 0
    for place, size in ((move["args"]["Addr"], move["args"]["Bytes"]) for move in moves):
        if size > 0:
            held[place] = size
        # what was there before the call has no size, or a wrong one, when it is given back
        now += size if size > 0 else -held.pop(place, 0)
        peak = max(peak, now)
    return peak / 2**20


def hardware(device: str = "auto") -> str:
    """What the figures were measured on, in words."""
    if pick_device(device).type == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].split(":", 1)[1].strip() if lines else name
    return f"{name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"  # with its instruction set
