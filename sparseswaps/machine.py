"""The machine that a run is on: memory and versions."""

from __future__ import annotations

import ctypes
import platform
import resource
import sys
from importlib.metadata import version
from pathlib import Path

__version__ = "0.1.0"

LIBRARIES = ("torch", "transformers", "numpy")


def versions() -> dict[str, str]:
    """Versions of what a result depends on; this package's own is known where it is not installed, too."""
    libraries = {name: version(name) for name in LIBRARIES}
    return {"python": platform.python_version(), "sparseswaps": __version__, **libraries}


def duration(seconds: float) -> str:
    """Seconds for people: ``under a second``, ``40 s``, ``5 min``, ``2.5 h``."""
    if seconds < 1:
        return "under a second"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    """Bytes for people: ``under 1 MB``, ``150 MB``, ``1.25 GB``."""
    if count < 1e6:
        return "under 1 MB" if count else "0 MB"
    return f"{count / 1e6:.0f} MB" if count < 0.9995e9 else f"{count / 1e9:.2f} GB"


def peak_memory_mb() -> float:
    """Largest resident set of this process so far, in 10⁶ bytes."""
    if sys.platform == "linux":  # ru_maxrss starts from the size of the process that started this one
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def resident_memory() -> int:
    """Bytes of main memory that this process holds now; its largest so far where nobody says."""
    for line in _lines(Path("/proc/self/status")):
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return int(peak_memory_mb() * 1e6)


def give_back_memory() -> None:
    """Let the C library give back to the system what it keeps of freed memory, where it can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def available_memory() -> int | None:
    """Bytes of main memory that this process may still take, None where nobody says."""
    found = []
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        root = Path("/sys/fs/cgroup") if limit == "memory.max" else Path("/sys/fs/cgroup/memory")
        folder = root / _own_group(limit != "memory.max")
        most, now = _lines(folder / limit), _lines(folder / used)
        if most and now and most[0].isdigit():
            cached = sum(int(x.split()[1]) for x in _lines(folder / "memory.stat") if x.startswith("file "))
            found.append(int(most[0]) - int(now[0]) + cached)
    soft = resource.getrlimit(resource.RLIMIT_DATA)[0]
    if soft != resource.RLIM_INFINITY:
        used_data = [int(x.split()[1]) * 1024 for x in _lines(Path("/proc/self/status")) if "VmData" in x]
        found.append(soft - sum(used_data))
    return max(0, min(found)) if found else None


def _own_group(version_one: bool) -> str:
    """Path of this process's control group below the root."""
    for line in _lines(Path("/proc/self/cgroup")):
        _, controllers, path = line.split(":", 2)
        if (version_one and "memory" in controllers.split(",")) or (not version_one and not controllers):
            return path.strip("/")
    return ""


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
