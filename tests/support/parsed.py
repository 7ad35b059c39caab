"""A page of HTML, read as a browser would."""

from html.parser import HTMLParser


class Parsed(HTMLParser):
    """The tags of a page with their attributes, its text, and the tags that are not closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def images(self) -> list[dict]:
        """The attributes of each picture."""
        return [attributes for tag, attributes in self.tags if tag == "img"]

    def check_alone(self) -> None:
        """The page runs nothing and asks for nothing, and every picture has a text alternative."""
        assert self.open == []
        assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in self.tags}
        for tag, attributes in self.tags:
            assert not [name for name in attributes if name.startswith("on")]
            for name in ("src", "href"):
                assert attributes.get(name, "data:").startswith("data:"), tag
        assert all(len(attributes["alt"]) > 20 for attributes in self.images())
