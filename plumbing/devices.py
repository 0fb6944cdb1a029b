"""Devices, precision and memory: where and in which numbers a network is computed."""

import ctypes
import os
import platform
from pathlib import Path

import torch
from torch import nn


def pick_device(name: str = "auto") -> torch.device:
    """The device of that name; "auto" is CUDA, else Apple's MPS, else the CPU.

    Raises ValueError for a device that this machine does not have.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, present in available.items() if present)
    kind, _, number = name.partition(":")
    known = available.get(kind, False) and (not number or number.isdigit())
    if not known or (kind == "cuda" and int(number or 0) >= torch.cuda.device_count()):
        choices = ", ".join(kind for kind, present in available.items() if present)
        raise ValueError(f"device {name!r} is not available here: choose from {choices}")
    return torch.device(name)


def pick_precision(name: str, device: torch.device, trained: nn.Module | None = None) -> str:
    """The precision of that name; "auto" is bf16 where the hardware multiplies bf16, else fp32.

    On a CPU that does not multiply bf16, training in bf16 was ten times slower. trained is the
    network if it is to be trained: on a CPU, depthwise convolutions go backwards in bf16 so slowly
    that training a mobile network took 1.6 to 2.4 times as long as in fp32.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    layers = trained.modules() if trained and device.type == "cpu" else ()
    if any(isinstance(layer, nn.Conv2d) and layer.groups > 1 for layer in layers):
        return "fp32"
    able = torch.cpu.get_capabilities() if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities") else {}
    return "bf16" if able.get("avx512_bf16") or able.get("amx_bf16") else "fp32"


def looking_is_free(tensor: torch.Tensor) -> bool:
    """Whether reading a value of the tensor costs nothing.

    A GPU works through a queue of steps. To read a value, the host waits until the queue is empty,
    and then the GPU waits for the host. So values on a GPU are not validated.
    """
    return tensor.device.type != "cuda"


def keep_freed_memory() -> None:
    """Have glibc keep freed memory: giving it back and taking it anew slows a step on a CPU.

    A step of the first default recipe got a twelfth slower, the augmentation half as slow again.
    Without glibc nothing happens.
    """
    try:
        tune = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    tune(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, bytes
    tune(-3, 2**25)  # M_MMAP_THRESHOLD, the largest value that glibc accepts


def hardware(device: str = "auto") -> str:
    """What figures were measured on, in words, with a CPU's instruction set."""
    if pick_device(device).type == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].split(":", 1)[1].strip() if lines else name
    return f"{name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
