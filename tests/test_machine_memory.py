"""Peak resident size."""

from __future__ import annotations

import subprocess
import sys

from lorakit.machine import peak_rss_bytes

CHILD = "from lorakit.machine import peak_rss_bytes; a = peak_rss_bytes(); x = b'1' * 50_000_000; print(a, peak_rss_bytes())"


def test_it_counts_bytes_and_only_its_own() -> None:
    ballast = b"1" * 300_000_000  # the parent's size must not show in the child
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert after - before >= 45_000_000
    assert after < 250_000_000
    assert peak_rss_bytes() > len(ballast)
