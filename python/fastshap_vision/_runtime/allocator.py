"""Memory of the process that trains."""

from __future__ import annotations

import ctypes
import platform

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Lets this process keep the memory that tensors on the CPU give back, for the tensors of the next step.

    glibc returns large blocks to the system when they are freed, so that every step of a training loop pays for fresh
    pages again: a tenth of a packed ViT-S step and more. From this call on they stay with the process, whose resident
    memory therefore remains at its peak. Results don't change. Call it once, before the first step; `fastshap train`
    does.

    Returns:
        whether it took effect: False where the C library is not glibc (macOS, Windows, musl).

    Example:
        >>> import platform
        >>> fv.keep_freed_memory() == (platform.libc_ver()[0] == "glibc")
        True
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))
