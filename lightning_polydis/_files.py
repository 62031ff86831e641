"""JSON files with a kind and a format version, written so that a crash never leaves half a file."""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from lightning_polydis._checks import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

FORMAT_VERSION = 1


def write_json(path: str | Path, kind: str, content: dict[str, Any]) -> None:
    """Write ``content`` under a header; the file appears whole or not at all."""
    document = {"kind": f"lightning_polydis.{kind}", "format_version": FORMAT_VERSION, **content}
    with written_whole(path) as file:
        file.write(_lines(document).encode())


def _lines(document: dict[str, Any]) -> str:
    """The document as JSON, with a line for each entry of a list: to be read and compared, and ten times faster."""
    encode = json.JSONEncoder(allow_nan=False).encode
    parts = []
    for name, value in document.items():
        is_long = isinstance(value, list) and value
        text = "[\n" + ",\n".join(map(encode, value)) + "\n]" if is_long else encode(value)
        parts.append(f"{encode(name)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


@contextmanager
def written_whole(path: str | Path) -> Iterator[IO[bytes]]:
    """A file to write to that appears under its name, whole, when the block has ended, or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave an empty file under the name
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read_json(path: str | Path, kind: str) -> dict[str, Any]:
    """Read what `write_json` wrote.

    Raises:
        ValueError: If the file is no JSON, of another kind, or of a newer format.
    """
    wanted = f"lightning_polydis.{kind}"
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(
            f"Expected `{path}` to be a JSON file of kind `{wanted}`, but it cannot be read: {error}."
        ) from error
    found = document.get("kind") if isinstance(document, dict) else type(document).__name__
    if found != wanted:
        raise InputError(f"Expected `{path}` to be of kind `{wanted}`, but got `{found}`.")
    version = document.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise InputError(
            f"Expected `{path}` to have a format_version of at most {FORMAT_VERSION}, but got {version!r}. "
            "It was written by a newer lightning_polydis: update the package."
        )
    return cast("dict[str, Any]", document)


def parse(path: str | Path, build: Any, document: dict[str, Any]) -> Any:
    """``build(document)``, with whatever is missing or of the wrong type in words.

    Raises:
        ValueError: If ``document`` lacks a field or holds a wrong one.
    """
    try:
        return build(document)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"`{path}` is damaged: {type(error).__name__}: {error}.") from error
