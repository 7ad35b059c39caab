"""Pictures of one recording's attributions: ECG paper and the median beat, each with a band for the attribution.

Everything is readable without colour: attributions that raise the score go up, those that lower it go down.
"""

import io
from html import escape
from typing import NamedTuple

import matplotlib
from matplotlib.figure import Figure


class Picture(NamedTuple):
    """A figure, and in words what it shows: its text alternative."""

    figure: Figure
    words: str

    def png(self, dpi: int = 130) -> bytes:
        content = io.BytesIO()
        with matplotlib.rc_context({"font.family": "sans-serif"}):
            self.figure.savefig(content, format="png", dpi=dpi, metadata={"Software": None})
        return content.getvalue()

    def svg(self) -> str:
        """Without an address, a date or a program's name; the same figure gives the same text."""
        content = io.StringIO()
        without = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        with matplotlib.rc_context({"svg.hashsalt": "0", "svg.fonttype": "none", "font.family": "sans-serif"}):
            self.figure.savefig(content, format="svg", metadata=without)
        text = content.getvalue()
        return text[text.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{escape(self.words)}" ', 1)
