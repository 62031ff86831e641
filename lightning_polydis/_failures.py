"""What becomes of failures: the user's own come in Lightning's words, ours do not end a training run."""

from __future__ import annotations

import traceback
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_polydis._checks import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextmanager
def in_lightnings_words() -> Iterator[None]:
    """What the user can mend, as the exception that Lightning raises for it."""
    try:
        yield
    except InputError as error:
        raise MisconfigurationException(str(error)) from error


@contextmanager
def guarded(*, strict: bool, on_failure: Callable[[], None] = lambda: None) -> Iterator[None]:
    """What the user can mend raises in words; anything else raises only if ``strict``, and is a warning otherwise."""
    try:
        with in_lightnings_words():
            yield
    except MisconfigurationException:
        on_failure()
        raise
    except Exception:  # whatever it is: no failure of ours may end a training run
        on_failure()
        if strict:
            raise
        # By any process: the others only learn that there was a failure.
        warnings.warn(f"The analysis of this epoch failed and is dropped:\n{traceback.format_exc()}", stacklevel=3)
