"""Parses the XML of recorders so that a hostile document opens nothing and costs little memory."""

import re
from xml.etree.ElementTree import Element, ParseError, TreeBuilder

from defusedxml.common import DefusedXmlException
from defusedxml.ElementTree import DefusedXMLParser

from lsemvae.errors import UnreadableRecording

MAX_BYTES = 2**24
MAX_MARKUP = 200_000
"""The most "<" and the most "=" in a document: they bound its elements and attributes, which cost the memory."""
MAX_DEPTH = 100

# Declared encoding, as letters and digits alone (CardioSoft spells it ISO8859-1) -> encoding to parse with. A document
# whose declaration can be read as bytes is not UTF-16, even if it declares so.
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
                "too_large", f"its elements are nested deeper than {MAX_DEPTH}, as in no recording: export it again"
            )
        return super().start(tag, attributes)

    def end(self, tag: str) -> Element:
        self.depth -= 1
        return super().end(tag)


def parse(name: str, content: bytes, *, named_dtd: bool = False) -> Element:
    """The root element of the document in the file `name`.

    Before anything is expanded, opened or fetched, it refuses a DTD, entities and external references, documents beyond
    `MAX_BYTES`, `MAX_MARKUP` or `MAX_DEPTH`, and encodings other than UTF-8, UTF-16, Latin-1 and similar ones. With
    `named_dtd` a DOCTYPE may name an external DTD, as in GE MUSE files; it is not read, and a DOCTYPE that holds
    declarations is still refused. clinical.py also uses this function as a check: a document that passes is harmless to
    any parser. Raises UnreadableRecording.
    """
    try:
        return _parse(content, named_dtd)
    except UnreadableRecording as error:
        raise UnreadableRecording(error.code, f"{name}: {error}") from None


def root_name(head: bytes) -> str | None:
    """Name of the root element, or the one that the DOCTYPE names, without prefix; None if this is not XML."""
    encoding = "utf-16" if head.startswith(_UTF16_MARKS) else "latin-1"
    match = _ROOT.match(head.removeprefix(b"\xef\xbb\xbf").decode(encoding, "ignore"))
    return match[1] if match else None


def _parse(content: bytes, named_dtd: bool) -> Element:
    if len(content) > MAX_BYTES:
        raise UnreadableRecording("too_large", f"it has {len(content)} bytes of XML: {MAX_BYTES} are the limit")
    if (markup := max(content.count(b"<"), content.count(b"="))) > MAX_MARKUP:
        raise UnreadableRecording("too_large", f"it has {markup} elements or attributes: {MAX_MARKUP} are the limit")

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
        raise UnreadableRecording("xml", f"it is not well-formed XML ({str(error)[:100]}): export it again") from None


def _unsafe(what: str) -> UnreadableRecording:
    return UnreadableRecording("unsafe_xml", f"its XML has {what}, which no recording needs: remove the DOCTYPE")


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
        raise UnreadableRecording("xml", f"its encoding is {spelled!r}, unknown here: save it as UTF-8") from None
