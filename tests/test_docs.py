"""The documentation: its code runs, and it speaks of all that is public."""

import copy
import inspect
import json
import re
from pathlib import Path

import pytest
import torch

import lightning_polydis
from lightning_polydis import ChannelDisentanglement, find_polysemantic_channels
from tests.networks import loader, make_images
from tests.test_readme import Resnet

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
NOT_PYTHON = {"text", "bash", "yaml", "json"}
PROSE = {"concepts.md", "limits.md", "memory.md", "peers.md", "support.md"}
"""Pages without code, beside those of the API, whose examples are doctests."""


def python_blocks(text):
    """First line (counted from 0) and code of each Python block; a block that is of no known language is an error."""
    blocks, language, first, code = [], None, 0, []
    for number, line in enumerate(text.splitlines()):
        if not line.lstrip().startswith(("```", "~~~")):
            code.append(line)
        elif language is None:
            language, first, code = line.removeprefix("```"), number + 1, []
            if language not in {"python", *NOT_PYTHON}:
                raise ValueError(f"Line {number + 1}: expected ```python or one of {NOT_PYTHON}, but got {line!r}.")
        else:
            if language == "python":
                blocks.append((first, "\n".join(code)))
            language = None
    if language is not None:
        raise ValueError(f"The block that begins at line {first} has no end.")
    return blocks


@pytest.fixture(scope="module")
def analysed():
    """The network of the README's test, and its report."""
    torch.manual_seed(0)
    model = Resnet().eval()
    thresholds = {"relevance_threshold": 0.001, "class_fraction": 0.1, "similarity_threshold": 0.9}
    report = find_polysemantic_channels(model, loader(), layers="layer4.2.conv3", progress=False, **thresholds)
    assert len(report.plan) > 0
    return model, report


def test_there_are_pages():
    assert DOCS / "captum.md" in PAGES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_every_code_block_of_a_page_runs(page, analysed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model, report = analysed
    images, targets = make_images()
    names = {
        "__name__": "__main__",
        "model": copy.deepcopy(model),
        "report": report,
        "images": images,
        "targets": targets,
        "val_loader": loader(),
        "other_loader": loader(seed=5),
    }
    blocks = python_blocks(page.read_text(encoding="utf-8"))
    is_prose = page.name in PROSE or page.parent.name == "api"
    assert bool(blocks) != is_prose, "a how-to without code, or code on a page of prose"
    for first, code in blocks:
        exec(compile("\n" * first + code, str(page), "exec"), names)  # tracebacks show the page's own lines


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```py\nx = 1\n```", "Line 1: expected ```python"),
        ("text\n\n```\nx = 1\n```", "Line 3: expected ```python"),
        ("- item\n  ```python\n  x = 1\n  ```", "Line 2: expected ```python"),
        ("~~~python\nx = 1\n~~~", "Line 1: expected ```python"),
        ("```python\nx = 1\n", "begins at line 1 has no end"),
    ],
)
def test_a_block_that_would_be_left_out_is_an_error(text, message):
    with pytest.raises(ValueError, match=message):
        python_blocks(text)


def test_blocks_are_found_with_their_lines():
    assert python_blocks("a\n```python\nx = 1\n\ny = 2\n```\n```text\nz\n```\n```python\n```") == [
        (2, "x = 1\n\ny = 2"),
        (10, ""),
    ]


def test_every_public_name_has_a_place_in_the_api():
    text = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    shown = set(re.findall(r"^::: lightning_polydis\.[\w.]*?(\w+)$", text, re.M))
    assert set(lightning_polydis.__all__) - {"__version__"} <= shown


def test_every_argument_of_the_callback_is_among_the_settings():
    rows = re.findall(r"^\| (`.*?`) \|", (DOCS / "settings.md").read_text(encoding="utf-8"), re.M)
    listed = re.findall(r"`(\w+)`", " ".join(rows))
    assert sorted(listed) == sorted(set(inspect.signature(ChannelDisentanglement).parameters))


def test_the_example_of_memory_is_what_the_formula_gives(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS.parent / "benchmarks"))
    from memory import bytes_kept

    lines = (DOCS / "memory.md").read_text(encoding="utf-8").splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if "GiB**" in line]
    settings = [{}, {"memory": 256}, {"samples": 8}, {"samples": 0}, {"method": "paper"}]
    for (name, *shown), own in zip(rows, settings, strict=True):
        assert all(f"{key}={json.dumps(value)}" in name for key, value in own.items())
        kept = [size / 2**20 for size in bytes_kept(1000, 2048, 512, 49, **own).values()]
        assert shown == [*(f"{size:.0f}" for size in kept), f"**{sum(kept) / 1024:.2f} GiB**"]
