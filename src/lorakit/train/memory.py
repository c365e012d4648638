"""How much memory this process has needed; the kernel's own count, no package.

Knows nothing about training.
"""

from __future__ import annotations

import sys
from pathlib import Path


def peak_rss_bytes() -> int:
    """The largest resident size of this process so far, in bytes; 0 where the system does not say.

    On Linux the kernel's high-water mark of this program is read: `getrusage` there also counts what stood in the
    process before it became this program.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
