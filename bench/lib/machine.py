"""Where something is measured: the processor or GPU, the versions, the commit."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fastshap_kernels

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
#: Flags that tell apart what PyTorch, its libraries and our kernels choose by: first x86's, then ARM's.
INSTRUCTION_SETS = ("sse4_2", "avx", "avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16")
INSTRUCTION_SETS += ("amx_bf16", "amx_int8", "amx_fp16", "asimd", "sve", "sve2", "bf16", "i8mm", "sme")
VENDORS = {"GenuineIntel": "Intel", "AuthenticAMD": "AMD", "0x41": "ARM", "0x61": "Apple"}


def output_of(*words: str) -> str:
    """What a command prints; empty where it fails."""
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


@cache
def processor() -> dict[str, Any]:
    """Vendor, model and instruction sets. Virtual machines hide the model's name, but not its family and number."""
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    return parse(text) if text else parse(f"model name: {output_of('sysctl', '-n', 'machdep.cpu.brand_string')}")


def parse(cpuinfo: str) -> dict[str, Any]:
    """The first processor of a /proc/cpuinfo."""
    fields = dict(re.findall(r"^([^:\n]+?)\s*:\s*(.*?)\s*$", cpuinfo.split("\n\n")[0], re.MULTILINE))
    vendor = fields.get("vendor_id") or fields.get("CPU implementer", "")
    name = re.sub(r"\((R|TM)\)|\bCPU\b|@.*", " ", fields.get("model name") or platform.machine())
    numbers = [f"{key.split()[-1]} {fields[key]}" for key in ("cpu family", "model", "CPU part") if key in fields]
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return {
        "vendor": VENDORS.get(vendor, vendor or "unknown"),
        "model": " ".join(name.split()) + (f" ({', '.join(numbers)})" if numbers else ""),
        "instruction_sets": [flag for flag in INSTRUCTION_SETS if flag in flags],
    }


def slug(text: str) -> str:
    """As a file's name: small letters, digits and hyphens."""
    return "-".join(re.findall(r"[a-z0-9]+", text.lower()))


def processor_slug() -> str:
    vendor, model = processor()["vendor"], processor()["model"]
    return slug(model if model.lower().startswith(vendor.lower()) else f"{vendor} {model}")


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()["model"]


def commit() -> str:
    return os.environ.get("FASTSHAP_COMMIT") or output_of("git", "rev-parse", "--short", "HEAD") or "unknown"


def now(style: str) -> str:
    return f"{datetime.datetime.now(datetime.timezone.utc):{style}}"


def header(device: torch.device = CPU) -> dict[str, Any]:
    """What every results file says of where it was made."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    return {
        "device": device_name(device),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
        "fastshap_kernels": fastshap_kernels.__version__,
        "commit": commit(),
        "date": now("%Y-%m-%d %H:%M UTC"),
    }


def describe(error: Exception) -> str:
    """Its kind and first line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:300]
