"""Argument checks that several modules share, each with a message that says what was expected and what came."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable


class InputError(ValueError):
    """Something that the user can mend; the message says how."""


def check_in_range(name: str, value: Any, low: float, high: float) -> None:
    """Raise `ValueError` unless ``value`` is a number in ``(low, high]``."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low < value <= high:
        raise InputError(f"Expected argument `{name}` to be a number in ({low:g}, {high:g}], but got {value!r}.")


def check_positive_int(name: str, value: Any, *, minimum: int = 1) -> None:
    """Raise `ValueError` unless ``value`` is an integer of at least ``minimum``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise InputError(f"Expected argument `{name}` to be an integer of at least {minimum}, but got {value!r}.")


def check_bool(name: str, value: Any) -> None:
    """Raise `ValueError` unless ``value`` is `True` or `False`."""
    if not isinstance(value, bool):
        raise InputError(f"Expected argument `{name}` to be True or False, but got {value!r}.")


def check_place_or_key(name: str, value: Any) -> None:
    """Raise `ValueError` unless ``value`` is an integer, a string or `None`."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | str)):
        raise InputError(f"Expected argument `{name}` to be a place, a key or None, but got {value!r}.")


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Raise `ValueError` unless ``value`` is one of ``choices``."""
    choices = list(choices)
    if value not in choices:
        allowed = ", ".join(repr(choice) for choice in choices)
        raise InputError(f"Expected argument `{name}` to be one of {allowed}, but got {value!r}.")


def closest_names(name: str, names: Iterable[str]) -> str:
    """The names most like ``name``, ready to be put into a message (empty if there are none)."""
    close = get_close_matches(name, list(names), cutoff=0.4)
    return ", ".join(f"`{candidate}`" for candidate in close)
