"""Processes that are killed in the middle of what they keep."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path


def killed_after(command: list[str], environment: dict[str, str], kept: Path, seconds: float) -> None:
    """Run until `kept` is written anew, and so many seconds longer; then kill."""
    at = _written(kept)
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and _written(kept) == at:
        time.sleep(0.005)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.wait()


def _written(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0
