"""The HTML page as tests look at it, and names that want to be more than text in it."""

from dataclasses import replace
from html.parser import HTMLParser

from tests.sample_reports import sample_report

VOID = {"meta", "img", "input", "br", "wbr", "hr", "link"}
HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</title></style></script><script>alert(1)</script>",
    "{{ 1234 * 10 }}{% raw %}",
    "&lt;b&gt; &amp;",
    "javascript:alert(1)",
    "<svg/onload=alert(1)>",
    "-->]]><!--",
    "\u202egnp.exe \U0001f600 \N{COMBINING ACUTE ACCENT}",
]
OVERLAPS = """parts => {
  const boxes = parts.map(part => part.getBoundingClientRect()).filter(box => box.width && box.height);
  let n = 0;
  boxes.forEach((a, i) => boxes.slice(i + 1).forEach(b => {
    if (a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1) n += 1;
  }));
  return n;
}"""


class Page(HTMLParser):
    """Elements, attributes and texts of a page."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.texts, self._open = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag, "elements are not nested"

    def handle_data(self, data):
        self.texts.append((self._open[-1] if self._open else "", data))

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self):
        return " ".join(" ".join(data for tag, data in self.texts if tag not in ("script", "style")).split())


def hostile_report():
    report = sample_report(class_names=HOSTILE, layers=("net.<script>alert(2)</script>", 'a"onclick="b'))
    settings = {**report.settings, "attribution": "<i>x</i>", "<u>key</u>": ["<b>", '"']}
    return replace(report, notes=[*report.notes, *HOSTILE], settings=settings)
