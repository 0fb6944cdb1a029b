"""Seconds, memory and arithmetic of a call, measured so that a busy machine changes them little."""

import gc
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences the profiler

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile


def finish(device: torch.device) -> None:
    """Wait until the device has done all that it was asked to do."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def forward_flop(network, side: int) -> int:
    """Floating-point operations of a forward pass per image of that side; a multiply-add is two."""
    with torch.no_grad():
        return flops(lambda: network(torch.zeros(2, 3, side, side))) // 2  # BatchNorm in training mode needs two images


def flops(call) -> int:
    """Floating-point operations of a call, in its matrix products and convolutions."""
    from torch.utils.flop_counter import FlopCounterMode  # imported late: it takes time

    countable = sdpa_kernel(SDPBackend.MATH)  # the counter misses attention's own kernels on a CPU
    with FlopCounterMode(display=False) as counter, countable:
        call()
    return counter.get_total_flops()


def in_turn(calls: dict[str, object], device: torch.device, repeats: int, warm: int = 2) -> dict[str, list[float]]:
    """Seconds of each call, round after round: what slows the machine slows all calls alike."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warm + repeats):
        for name, call in calls.items():
            finish(device)
            started = time.perf_counter()
            call()
            finish(device)
            if turn >= warm:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, other: str) -> dict[str, float]:
    """How many times as long `name` takes as `other`: the median over rounds, and the quartiles."""
    ratios = [a / b for a, b in zip(seconds[name], seconds[other])]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
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
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        trace = json.loads(Path(folder, "trace.json").read_text(errors="replace"))["traceEvents"]
    moves = sorted((event for event in trace if event["name"] == "[memory]"), key=lambda event: event["ts"])
    held, now, peak = {}, 0, 0
    for place, size in ((move["args"]["Addr"], move["args"]["Bytes"]) for move in moves):
        if size > 0:
            held[place] = size
        # Memory from before the call has no size, or a wrong one, when it is given back.
        now += size if size > 0 else -held.pop(place, 0)
        peak = max(peak, now)
    return peak / 2**20
