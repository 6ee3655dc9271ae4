"""A page as its tags, attributes and texts, and what must be true of every page that we write."""

from __future__ import annotations

import re
from html.parser import HTMLParser

_VOID = {"meta", "br", "link", "img"}
_EXACT = {"pre", "code", "style", "svg"}  # what recipes, names and pictures hold is not ours to format


class Page(HTMLParser):
    """The page's tags and texts; fails where tags do not close in order.

    Attributes:
        tags: All tags.
        attributes: All attributes, (name, value).
        texts: All texts.
        elements: Every element: its tag, its attributes, and the tags and classes around it.
        prose: The texts outside code and pictures.
    """

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.texts, self.elements, self.prose = [], [], [], [], []
        self._open: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in _VOID:
            self._open.append((tag, dict(attrs).get("class") or ""))

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.elements.append((tag, dict(attrs), list(self._open)))

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        self.texts.append(data)
        if not _EXACT & {tag for tag, _ in self._open}:
            self.prose.append(data)

    def of(self, tag: str) -> list[tuple[dict, list]]:
        """The attributes of each element of a tag, and what is around it."""
        return [(attributes, around) for name, attributes, around in self.elements if name == tag]


def check_stands_alone(text: str) -> Page:
    """Check that a page loads nothing, runs nothing, fits a telephone, explains its terms, and formats its numbers."""
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "base", "form", "embed", "audio", "video"} & set(page.tags)
    names = {name for name, _ in page.attributes}
    assert not {"src", "srcset", "action", "data", "poster"} & names and not any(n.startswith("on") for n in names)
    assert all(v.startswith(("#", "https://")) for k, v in page.attributes if k in ("href", "xlink:href"))
    assert all(a == "https" for a, _ in re.findall(r'href="(\w+)(:[^"]*)"', text))
    assert "@import" not in text and not re.search(r"url\((?!#)", text) and "@font-face" not in text
    assert ({"name": "viewport", "content": "width=device-width, initial-scale=1"}, [("html", ""), ("head", "")]) in (
        page.of("meta")
    )
    for attributes, around in page.of("table"):
        narrow = "checks" in attributes.get("class", "")  # is a list on a narrow screen
        assert narrow or any(tag == "div" and "scroll" in kind.split() for tag, kind in around)
    explained = [attributes.get("title", "") for attributes, _ in page.of("abbr")]
    assert explained and all(explained)
    assert len(page.of("dt")) >= 5 and 'id="terms"' in text
    prose = re.sub(r"[0-9a-f]{32,}", "", "\n".join(page.prose))
    assert not re.search(r"\d[eE][-+]?\d|\d\.\d{5,}|\bnan\b|\binf\b|None", prose)
    return page
