"""XML that recorders write, parsed so that a hostile document reaches nothing and costs little."""

import re
from xml.etree.ElementTree import Element, ParseError, TreeBuilder

from defusedxml.common import DefusedXmlException
from defusedxml.ElementTree import DefusedXMLParser

from lsemvae.errors import UnreadableRecording

MAX_BYTES = 2**24
MAX_MARKUP = 200_000
"""Of "<" and of "=" in a document: more elements or attributes it cannot have, and they are what costs memory."""
MAX_DEPTH = 100

# The encoding that the declaration names, reduced to letters and digits (CardioSoft spells it ISO8859-1), and
# what to parse it as. Whoever reads the declaration as bytes knows that it is no UTF-16, whatever it claims.
_ENCODINGS = {
    "utf8": "utf-8",
    "utf16": "utf-8",
    "ascii": "us-ascii",
    "usascii": "us-ascii",
    "iso88591": "iso-8859-1",
    "latin1": "iso-8859-1",
    "windows1252": "windows-1252",
    "cp1252": "windows-1252",
}
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_DECLARATION = re.compile(rb"""(?:\xef\xbb\xbf)?\s*<\?xml\s[^>]{0,200}?\bencoding\s*=\s*["']([^"'>]{1,40})["']""")
_ROOT = re.compile(r"(?:\s|<\?.*?\?>|<!--.*?-->)*+<(?:!DOCTYPE\s+)?(?:[\w.-]+:)?([\w.-]+)", re.DOTALL)


class _BoundedBuilder(TreeBuilder):
    depth = 0

    def start(self, tag: str, attributes: dict[str, str]) -> Element:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise UnreadableRecording(
                "too_large", f"its elements are nested deeper than {MAX_DEPTH}: no recorder does that"
            )
        return super().start(tag, attributes)

    def end(self, tag: str) -> Element:
        self.depth -= 1
        return super().end(tag)


def parse(name: str, content: bytes, *, named_dtd: bool = False) -> Element:
    """The root element of the document in the file `name`.

    Refused before anything is expanded, opened or fetched: a DTD, entities, external references; documents of
    more than `MAX_BYTES`, `MAX_MARKUP` or `MAX_DEPTH`; encodings other than UTF-8, UTF-16, Latin-1 and their
    like. With `named_dtd` a DOCTYPE may name an external DTD, as GE MUSE's does; it is not read, and one that
    holds declarations is refused all the same. The gate before formats whose library parses for itself
    (clinical.py) too: what has passed here is harmless to any parser. Raises UnreadableRecording.
    """
    try:
        return _parse(content, named_dtd)
    except UnreadableRecording as error:
        raise UnreadableRecording(error.code, f"{name}: {error}") from None


def root_name(head: bytes) -> str | None:
    """Name of the root element, or of that which the DOCTYPE names, without its prefix; None if this is no XML."""
    encoding = "utf-16" if head.startswith(_UTF16_MARKS) else "latin-1"
    match = _ROOT.match(head.removeprefix(b"\xef\xbb\xbf").decode(encoding, "ignore"))
    return match[1] if match else None


def _parse(content: bytes, named_dtd: bool) -> Element:
    if len(content) > MAX_BYTES:
        raise UnreadableRecording("too_large", f"{len(content)} bytes of XML: {MAX_BYTES} are the limit")
    if (markup := max(content.count(b"<"), content.count(b"="))) > MAX_MARKUP:
        raise UnreadableRecording("too_large", f"{markup} elements or attributes: {MAX_MARKUP} are the limit")

    def refuse_declarations(doctype: str, system: str | None, public: str | None, has_subset: bool) -> None:
        if has_subset or not named_dtd:
            raise _unsafe("a DTD")

    parser = DefusedXMLParser(target=_BoundedBuilder(), encoding=_encoding(content))
    parser.parser.StartDoctypeDeclHandler = refuse_declarations
    try:
        parser.feed(content)
        return parser.close()
    except DefusedXmlException as error:
        raise _unsafe(type(error).__name__) from None
    except (ParseError, ValueError, LookupError) as error:
        if isinstance(error, UnreadableRecording):
            raise
        raise UnreadableRecording("xml", f"it is no well-formed XML ({str(error)[:100]}): export it again") from None


def _unsafe(what: str) -> UnreadableRecording:
    return UnreadableRecording("unsafe_xml", f"its XML has {what}, which no recorder needs: remove the DOCTYPE")


def _encoding(content: bytes) -> str:
    if content.startswith(_UTF16_MARKS):
        return "utf-16"
    match = _DECLARATION.match(content)
    if match is None:
        return "utf-8"
    spelled = match[1].decode("latin-1")
    try:
        return _ENCODINGS[re.sub(r"[^a-z0-9]", "", spelled.lower())]
    except KeyError:
        raise UnreadableRecording("xml", f"its encoding is {spelled!r}: save it as UTF-8") from None
