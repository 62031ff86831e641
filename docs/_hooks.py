"""What the site does beyond mkdocs: pages from elsewhere in the repository, formulas, the command line's help."""

from __future__ import annotations

import html
import io
import os
import posixpath
import re
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import griffe
from latex2mathml.converter import convert
from mkdocs.structure.files import File

from lightning_polydis.cli import main

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

os.environ["COLUMNS"] = "88"  # width of the command line's help
ROOT = Path(__file__).parent.parent

OUTSIDE = {
    "benchmarks/README.md": "benchmarks.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "README.md": "index.md",
}
"""Files of the repository that are pages of the site, though they stand outside of its folder."""

LINK = re.compile(r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?\)")
FORMULA = re.compile(
    r'<span class="arithmatex">\\\((?P<inline>.*?)\\\)</span>'
    r'|<div class="arithmatex">\\\[(?P<block>.*?)\\\]</div>'
    r"|:math:<code>(?P<role>.*?)</code>",  # in docstrings
    re.S,
)
HELP = re.compile(r"<!-- help(?: of (?P<command>[\w-]+))? -->")


class Examples(griffe.Extension):
    """Docstrings here say ``Example:``, what reads them for the API pages knows ``Examples:``."""

    def on_instance(self, *, obj: griffe.Object, **_: object) -> None:
        """Called for each object whose docstring may be shown."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.M)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that stand elsewhere in the repository."""
    for path, page in OUTSIDE.items():
        if not (ROOT / "docs" / page).exists():
            files.append(File.generated(config, page, content=(ROOT / path).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to where the pages are on the site, and fill in the command line's help."""
    homes = {to: path for path, to in OUTSIDE.items() if to != "index.md"}
    home = homes.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def led(match: re.Match[str]) -> str:
        picture, text, link, anchor = match.groups(default="")
        target = posixpath.normpath(posixpath.join(posixpath.dirname(home), link))
        inside = OUTSIDE.get(target, target.removeprefix("docs/") if target.startswith("docs/") else None)
        if inside is None:  # a file of the repository that is no page
            return text
        return f"{picture}[{text}]({posixpath.relpath(inside, posixpath.dirname(page.file.src_uri) or '.')}{anchor})"

    return HELP.sub(_help, LINK.sub(led, markdown))


def _help(match: re.Match[str]) -> str:
    shown = io.StringIO()
    with redirect_stdout(shown), suppress(SystemExit):
        main([*filter(None, [match["command"]]), "--help"])
    return f"```text\n{shown.getvalue()}```"


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Formulas as MathML, which browsers draw by themselves: no script, no font, no network."""
    return FORMULA.sub(_formula, content)


def _formula(match: re.Match[str]) -> str:
    display = "block" if match["block"] else "inline"
    return convert(html.unescape(match[match.lastgroup]).strip(), display=display)
