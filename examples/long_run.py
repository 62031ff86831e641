"""What a program needs that runs for an hour: what is done is kept, and how far it is can be seen."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torchvision.datasets import ImageFolder

N_UNTIMED, N_TIMED = 2, 10
"""Batches that pass before time is taken, and those that are timed until it is told how long all will take.

Two more of each for each worker: so many are loaded ahead at the start, and they come in bursts."""

LOG_SECONDS = 60


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Have a file written elsewhere and moved to its place: a run that is killed leaves no half of it."""
    part = path.with_name(f"{path.name}.part")
    write(part)
    os.replace(part, path)


def digest_of_weights(model: nn.Module) -> str:
    """A short text that another network will not have."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def digest_of_files(dataset: ImageFolder) -> str:
    """A short text that other files will not have. Goes by their names, as to read them all would take too long."""
    names = [os.path.relpath(path, dataset.root) for path, _ in dataset.samples]
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:12]


class Stages:
    """Which stages have ended, and what each was given: one that is given something else is to be done again.

    Args:
        folder: Where the results are; ``stages.json`` in it holds what this class has to remember.
        given: What each stage is given now, in plain types; the stages in their order.
        results: Patterns of the files that each stage leaves in the folder.
    """

    def __init__(self, folder: Path, given: Mapping[str, dict[str, Any]], results: Mapping[str, Sequence[str]]) -> None:
        self._folder, self._file, self._results = folder, folder / "stages.json", results
        self._given = json.loads(json.dumps(given))  # as the file will give it back
        self._known = json.loads(self._file.read_text(encoding="utf-8")) if self._file.exists() else {}

    def has_begun(self, stage: str) -> bool:
        """Whether it is known what the stage was given the last time."""
        return stage in self._known

    def has_ended(self, stage: str) -> bool:
        """Whether there are results, whatever the stage was given."""
        there = all(any(self._folder.glob(pattern)) for pattern in self._results[stage])
        return there and self.has_begun(stage) and self._known[stage]["has_ended"]

    def is_done(self, stage: str) -> bool:
        """Whether there are results of what the stage is given now."""
        return self.has_ended(stage) and not self.changes(stage)

    def left(self) -> list[str]:
        """The stages that are to be done: the first one that is not done, and all that come after it."""
        names = list(self._given)
        first = next((place for place, name in enumerate(names) if not self.is_done(name)), len(names))
        return names[first:]

    def changes(self, stage: str) -> list[str]:
        """What the stage was given the last time in place of what it is given now; nothing if it never began."""
        if not self.has_begun(stage):
            return []
        then, now = self._known[stage]["given"], self._given[stage]
        return [
            f"{name} was {then.get(name)!r} and is {now.get(name)!r}"
            for name in {**then, **now}
            if then.get(name) != now.get(name)
        ]

    def begin(self, stage: str) -> None:
        """Note what the stage is given, and take old results of it and of those after it away."""
        for later in filter(self.has_begun, self.left()):  # or the files are somebody else's
            for pattern in self._results[later]:
                for path in self._folder.glob(pattern):
                    path.unlink()
        self._note(stage, has_ended=False)

    def end(self, stage: str) -> None:
        """Note that the results are there."""
        self._note(stage, has_ended=True)

    def _note(self, stage: str, *, has_ended: bool) -> None:
        self._known[stage] = {"has_ended": has_ended, "given": self._given[stage]}
        self._folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self._known, indent=1)
        write_whole(self._file, lambda path: path.write_text(text, encoding="utf-8"))


class Watch:
    """Shows how far a stage is, how fast it goes and how long it will take; in a log file, a line every minute.

    Args:
        console: Where to.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._has_estimated = False

    def through(
        self,
        batches: Iterable[Any],
        stage: str,
        n_images: int,
        *,
        n_done: int = 0,
        n_later: int = 0,
        n_workers: int = 0,
    ) -> Iterator[Any]:
        """The batches, ``(images, targets)`` each, while somebody works on them.

        Args:
            batches: Those that are left.
            stage: What is being done.
            n_images: Images of this stage.
            n_done: Those that were done before.
            n_later: Images of the stages that will follow; they are counted in when the time of all is estimated.
            n_workers: Processes that load the batches.
        """
        n_untimed, n_timed = (number + 2 * n_workers for number in (N_UNTIMED, N_TIMED))
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[pace]}"), TimeRemainingColumn())
        bar = Progress(TextColumn("{task.description}"), *columns, console=self._console, transient=True)
        bar.disable = not self._console.is_terminal
        counted, start = 0, time.monotonic()
        logged = start
        with bar:
            task = bar.add_task(stage, total=n_images, completed=n_done, pace="")
            for number, batch in enumerate(batches):
                if number == n_untimed:
                    counted, start = 0, time.monotonic()
                yield batch
                counted, n_done = counted + len(batch[1]), n_done + len(batch[1])
                pace = counted / max(time.monotonic() - start, 1e-9)
                bar.update(task, completed=n_done, pace=f"{pace:.0f} images/s")
                if number == n_untimed + n_timed - 1:
                    self._estimate(pace, n_images - n_done, n_later)
                if bar.disable and number >= n_untimed and time.monotonic() - logged >= LOG_SECONDS:
                    logged = time.monotonic()
                    left = duration((n_images - n_done) / pace)
                    self._say(f"{stage}: {n_done:,} of {n_images:,} images, {pace:.0f} images/s, {left} left")
        self._say(f"{stage}: {n_done:,} images, {pace:.0f} images/s" if counted else f"{stage}: nothing was left to do")

    def _estimate(self, pace: float, n_here: int, n_later: int) -> None:
        """How long all will take, once, as soon as it can be told."""
        if not self._has_estimated:
            self._has_estimated = True
            whole = duration((n_here + n_later) / pace)
            self._say(f"About {whole} to go: {n_here:,} images here, {n_later:,} later, {pace:.0f} images/s")

    def _say(self, text: str) -> None:
        self._console.print(text, soft_wrap=True, highlight=False)


def duration(seconds: float) -> str:
    """In words.

    Example:
        >>> duration(42), duration(3000), duration(8000)
        ('42 s', '50 min', '2 h 13 min')
    """
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
