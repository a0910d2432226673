"""What one compiled kernel takes of a device, and how its machine code is read."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import triton

_FUNCTION = re.compile(
    r"Function (?P<symbol>\w+):\s+"
    r"REG:(?P<registers>\d+) STACK:(?P<stack>\d+) SHARED:(?P<shared>\d+) LOCAL:(?P<local>\d+)"
)
# From sm_90 on the system keeps this much of a block's shared memory, and cuobjdump adds it where a kernel has any.
_RESERVED = 1024


@dataclass
class Resources:
    """Registers a thread, and bytes: of shared memory a block, of local memory a thread.

    Spilled registers lie in local memory, in the stack frame, as do arrays that the compiler can't keep in registers.
    """

    registers: int = 0
    shared: int = 0
    local: int = 0

    def at_most(self, other: Resources) -> Resources:
        """The larger of each."""
        return Resources(*(max(a, b) for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))


def cuobjdump(*arguments: str | Path) -> str:
    """What NVIDIA's tool, which Triton's wheel carries, prints of a compiled file."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    path = os.pathsep.join([str(tools), os.environ["PATH"]])
    command = [str(tools / "cuobjdump"), *map(str, arguments)]
    return subprocess.run(command, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=True).stdout


def usage(file: Path) -> Iterator[tuple[str, str, Resources]]:
    """The architecture, the symbol and the resources of each function in a compiled file."""
    for part in re.split(r"^arch = ", cuobjdump("-res-usage", file), flags=re.MULTILINE)[1:]:
        architecture = part.split("\n", 1)[0]
        reserved = _RESERVED if int(re.sub(r"\D", "", architecture)) >= 90 else 0
        for found in _FUNCTION.finditer(part):
            shared = max(int(found["shared"]) - reserved, 0)
            local = int(found["stack"]) + int(found["local"])
            yield architecture, found["symbol"], Resources(int(found["registers"]), shared, local)
