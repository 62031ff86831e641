"""Runs the benchmarks one after the other and writes their tables into README.md, between its markers.

What a benchmark prints to its standard output is written, with the command, the machine, the versions and the date; the
text around it stays. Benchmarks that are not run keep what they have.

Example:
    python benchmarks/run.py
    python benchmarks/run.py --only overhead memory
    python benchmarks/run.py --device cuda
    python benchmarks/run.py --quick
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parent
PACKAGES = ("torch", "torchvision", "lightning", "numpy")


@dataclass(frozen=True)
class Benchmark:
    """Some command lines whose tables stand together.

    Attributes:
        commands: Scripts of this folder with their arguments.
        quick: The same at a size that only shows that they run.
        on_gpu: What is run instead with ``--device cuda``: that takes minutes, not hours.
    """

    commands: tuple[str, ...]
    quick: tuple[str, ...]
    on_gpu: tuple[str, ...] = ()


SMALL_OVERHEAD = "validation_overhead.py --models squeezenet --image-size 48 --batch-size 4 --batches 0.025 --classes 5"
SMALL_WORLD = "against_paper_pipeline.py --images 2 --training-images 4 --epochs 1 --similarity-threshold 1 --splits 1"
SMALL_WORLD += " --relevance-threshold 0.03"
ON_GPU = "validation_overhead.py --device cuda --batch-size 64 --batches 2 --repeats 3"
BENCHMARKS = {
    "overhead": Benchmark(
        ("validation_overhead.py --repeats 3",),
        (f"{SMALL_OVERHEAD} --repeats 1 --variants bare optimized replay-optimized",),
        (f"{ON_GPU} --variants bare paper optimized clusters",),
    ),
    "replay": Benchmark(
        ("validation_overhead.py --variants replay-paper replay-optimized --batches 0.25 --repeats 3",),
        (),
        (f"{ON_GPU} --variants replay-paper replay-optimized",),
    ),
    "paper-pipeline": Benchmark(
        ("against_paper_pipeline.py",),
        (f"{SMALL_WORLD} --repeats 1",),
        ("against_paper_pipeline.py --device cuda",),
    ),
    "paper-pipeline-growth": Benchmark(
        ("against_paper_pipeline.py --growth --repeats 1",), (f"{SMALL_WORLD} --growth",)
    ),
    "split-layers": Benchmark(
        ("split_layers.py",), ("split_layers.py --quick",), ("split_layers.py --device cuda --batch-size 64 --eager",)
    ),
    "scale-growth": Benchmark(("scale.py --growth --threads 1 --method optimized",), ()),
    "scale": Benchmark(("scale.py",), ("scale.py --quick",)),
    "memory": Benchmark(("memory.py",), ("memory.py --quick",), ("memory.py --device cuda",)),
    "planted": Benchmark(
        tuple(f"planted.py {options}" for options in ("--in-common 20", "--in-common 0", "--in-common 0 --early")),
        (),
    ),
}


def printed(command: str) -> str:
    """What a benchmark prints; it is shown as it comes, for a long run may be broken off."""
    script, *options = shlex.split(command)
    arguments = [sys.executable, "-u", "-W", "ignore", str(FOLDER / script), *options]
    lines = []
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, arguments)
    return "".join(lines).strip()


def spaced(text: str) -> str:
    """With an empty line in front of and behind each table, which markdown wants."""
    lines: list[str] = []
    for line in text.splitlines():
        if lines and lines[-1] and line and line.startswith("|") != lines[-1].startswith("|"):
            lines.append("")
        lines.append(line)
    return "\n".join(lines)


def section(commands: Sequence[str], outputs: Sequence[str]) -> str:
    """What stands between the markers of a benchmark."""
    parts = [measured_on()]
    for command, output in zip(commands, outputs, strict=True):
        parts += [f"```\npython benchmarks/{command}\n```", spaced(output)]
    return "\n\n".join(parts)


def measured_on() -> str:
    """Date, machine and versions, in a sentence."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    machine = f"{_processor()}, {os.cpu_count()} cores, {memory:.0f} GiB"
    if torch.cuda.is_available():
        machine += f", {torch.cuda.get_device_name()}"
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    return f"*{datetime.date.today()}; {machine}; Python {platform.python_version()}, {versions}.*"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def replaced(text: str, marker: str, content: str) -> str:
    """The text with other content between two markers.

    Raises:
        ValueError: If the markers are not there, once each and in order.
    """
    first, last = f"<!-- {marker}: begin -->", f"<!-- {marker}: end -->"
    if text.count(first) != 1 or text.count(last) != 1 or text.index(first) > text.index(last):
        raise ValueError(f"Expected `{first}` and then `{last}` in the text, once each, but did not find them so.")
    before, rest = text.split(first)
    return f"{before}{first}\n{content}\n{last}{rest.split(last)[1]}"


def run(name: str, device: str, readme: Path) -> None:
    """Run one benchmark and write what it prints."""
    on_gpu = device == "cuda"
    commands = BENCHMARKS[name].on_gpu if on_gpu else BENCHMARKS[name].commands
    content = section(commands, [printed(command) for command in commands])
    marker = f"{name} on a GPU" if on_gpu else name
    readme.write_text(replaced(readme.read_text(), marker, content))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(BENCHMARKS), default=list(BENCHMARKS), metavar="NAME")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: writes the section on GPUs")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, printed and not written")
    return parser.parse_args()


def main() -> None:
    """Run what was asked for."""
    arguments = parse_arguments()
    for name in arguments.only:
        benchmark = BENCHMARKS[name]
        if arguments.quick:
            for command in benchmark.quick:
                printed(command)
        elif arguments.device == "cpu" or benchmark.on_gpu:
            print(f"{name} ...", flush=True)
            started = time.monotonic()
            run(name, arguments.device, FOLDER / "README.md")
            print(f"{name}: {(time.monotonic() - started) / 60:.1f} minutes", flush=True)
        else:
            print(f"{name}: measured on processors only", flush=True)


if __name__ == "__main__":
    main()
