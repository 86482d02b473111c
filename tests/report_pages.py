"""Pages of reports, read as a browser would."""

import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

VOID = {"meta", "link", "img", "br"}
HOSTILE = "<script>alert(1)<∕script> & $x$"  # a class; of the two runs, one chose a head and one trained all layers
PROBE, TUNED = "probe", "tuned"


class Page(HTMLParser):
    """Tags with their attributes, text, and whether every tag that is opened is closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.words.append(data.strip())

    @property
    def text(self) -> str:
        """With plain spaces."""
        return " ".join(filter(None, self.words)).replace("\N{NO-BREAK SPACE}", " ").replace("\N{WORD JOINER}", "")

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def addresses(self) -> set[str]:
        """Everything that a browser might ask for."""
        named = {
            str(each[key]) for _, each in self.tags for key in ("src", "href", "xlink:href", "srcset") if key in each
        }
        return (
            named | set(re.findall(r"url\(([^)]*)\)", self.source)) | set(re.findall(r"@import\s+(\S+)", self.source))
        )

    def check(self) -> None:
        """What holds of every page: self-contained, no script, pictures with words, headings in order."""
        assert all(address.startswith(("data:image/", "data:,", "#")) for address in self.addresses()), self.addresses()
        assert not {"script", "iframe", "object", "form", "base"} & {tag for tag, _ in self.tags}
        assert not [key for _, each in self.tags for key in each if key.startswith("on")]
        (policy,) = (each["content"] for each in self.all("meta") if "http-equiv" in each)
        assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
        assert self.all("html") == [{"lang": "en"}]
        assert all(each["alt"] for each in self.all("img"))
        assert all(each["role"] == "img" and each["aria-label"] for each in self.all("svg"))
        ids = [each["id"] for _, each in self.tags if "id" in each]
        assert len(ids) == len(set(ids))
        assert {address[1:] for address in self.addresses() if address.startswith("#")} <= set(ids)
        levels = [int(tag[1]) for tag, _ in self.tags if re.fullmatch(r"h[1-6]", tag)]
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(after <= before + 1 for before, after in pairwise(levels))
        for name, each in self.tags:
            if name == "div" and each.get("class") == "scroll":
                assert each["tabindex"] == "0"
                assert each["aria-label"]
