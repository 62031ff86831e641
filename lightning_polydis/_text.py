"""How several modules write counts and arguments."""

from __future__ import annotations

import reprlib
from inspect import signature
from typing import Any


def counted(number: int, noun: str) -> str:
    """A number and its noun.

    Example:
        >>> counted(1, "class"), counted(3, "class"), counted(0, "candidate")
        ('1 class', '3 classes', '0 candidates')
    """
    several = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number} {noun if number == 1 else several}"


def images_left_out(number: int) -> str:
    """What a report says of images that were not analysed.

    Example:
        >>> images_left_out(1)
        '1 image was left out because its batch held NaN or infinity.'
    """
    verb, whose = ("was", "its") if number == 1 else ("were", "their")
    return f"{counted(number, 'image')} {verb} left out because {whose} batch held NaN or infinity."


def changed_arguments(kind: type, *holders: object) -> str:
    """The arguments of a class that do not have their default values, as they are written in a call.

    Args:
        kind: The class.
        *holders: Objects that hold the values under the arguments' names; the first that has one counts.

    Example:
        >>> from types import SimpleNamespace
        >>> class Net:
        ...     def __init__(self, layers=None, *, split=False): ...
        >>> changed_arguments(Net, SimpleNamespace(layers="conv"), SimpleNamespace(split=False))
        "layers='conv'"
    """
    texts = []
    for name, parameter in signature(kind).parameters.items():
        value = next(getattr(holder, name) for holder in holders if hasattr(holder, name))
        if value is not parameter.default and (parameter.default is None or value != parameter.default):
            texts.append(f"{name}={_value(value)}")
    return ", ".join(texts)


def _value(value: Any) -> str:
    """A value in few characters; objects that have no text of their own by the name of their class."""
    if hasattr(value, "__name__"):  # functions
        return str(value.__name__)
    if repr(value) == object.__repr__(value):
        return type(value).__name__
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    return short.repr(value)
