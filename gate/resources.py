"""What one compiled kernel takes of a device, and how its machine code is read."""

from __future__ import annotations

import os
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

import triton


@dataclass
class Resources:
    """Registers a thread, shared memory a block and local memory a thread in bytes, and bytes of spills."""

    registers: int = 0
    shared: int = 0
    local: int = 0
    spills: int = 0

    def at_most(self, other: Resources) -> Resources:
        """The larger of each."""
        return Resources(*(max(a, b) for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))


def cuobjdump(*arguments: str | Path) -> str:
    """What NVIDIA's tool, which Triton's wheel carries, prints of a compiled file."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    path = os.pathsep.join([str(tools), os.environ["PATH"]])
    command = [str(tools / "cuobjdump"), *map(str, arguments)]
    return subprocess.run(command, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=True).stdout
