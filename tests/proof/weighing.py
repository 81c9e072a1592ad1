"""`python weighing.py OPTIONS`: `python -m bridge.ftp OPTIONS` that tells on SIGUSR2 what it has in memory.

A line on stdout: `in memory: CHANNELS channels, BLOCKS blocks, MEMORY kB`, after a garbage collection, and
after malloc gave back to the system what it can. So it does not matter when the collector ran last, nor how
much of the heap is free. test_soak_memory.py starts it; no tests in here.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
from typing import Any

import psutil
from pyftpdlib.ioloop import AsyncChat

import bridge.ftp


def tell(*_: Any) -> None:
    """Connections and listeners, objects that Python has allocated, and the process's own memory (USS)."""
    gc.collect()
    channels = sum(isinstance(each, AsyncChat) for each in gc.get_objects())
    blocks = sys.getallocatedblocks()
    ctypes.CDLL(None).malloc_trim(0)
    memory = psutil.Process().memory_full_info().uss // 1024
    # (Not print(): the next signal may come in the middle of it.)
    os.write(1, f"in memory: {channels} channels, {blocks} blocks, {memory} kB\n".encode())


if __name__ == "__main__":
    signal.signal(signal.SIGUSR2, tell)
    sys.exit(bridge.ftp.main(sys.argv[1:]))
