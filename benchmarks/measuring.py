"""What the benchmarks share: taking turns, spread, tables, memory of a process."""

from __future__ import annotations

import ctypes
import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

MEBIBYTE = 2**20
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def in_turns(variants: Mapping[str, Callable[[], float]], repeats: int, n_warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each variant, round by round, after one round that does not count.

    Each round begins with another variant, so that none always runs on what the same other one has left behind.

    Args:
        variants: Each runs once and returns the seconds that it took.
        repeats: Rounds that count.
        n_warm_up: Rounds before these.
    """
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(n_warm_up + repeats):
        first = turn % len(names)
        taken = {name: variants[name]() for name in names[first:] + names[:first]}
        if turn >= n_warm_up:
            for name, value in taken.items():
                seconds[name].append(value)
    return seconds


def ratios(seconds: Sequence[float], of: Sequence[float]) -> list[float]:
    """What one variant took relative to another, round by round."""
    return [a / b for a, b in zip(seconds, of, strict=True)]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median, with the lowest and the highest."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table."""
    return "\n".join(map(table_line, [header, ["---"] * len(header), *rows]))


def table_line(cells: Sequence[str]) -> str:
    """A line of a markdown table."""
    return f"| {' | '.join(cells)} |"


def wait_for(device: str) -> None:
    """Return when the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def keep_freed_memory() -> None:
    """Have glibc keep memory that is freed (Linux).

    Whether it gives that back to the system after each batch, and has to ask for it again, depends on what happens to
    lie behind it: the same network had from 12,000 to 65,000 page faults a batch, a quarter of an epoch's time, with
    the callback and without.
    """
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(M_MMAP_THRESHOLD, 2**25)  # the largest that it takes


def resident() -> float:
    """MiB of memory that this process holds, once freed memory is given back (Linux)."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return _status("VmRSS")


def peak_resident() -> float:
    """Largest resident set in MiB; not ``ru_maxrss``, which a new process takes over from its parent."""
    return _status("VmHWM")


def reset_peak() -> None:
    """Let the largest resident set be what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024
