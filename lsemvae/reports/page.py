"""The HTML shell of a report: one page that needs nothing else, so it may be mailed; and its tables and charts."""

import base64
from collections.abc import Sequence
from html import escape

# The policy forbids what a report does not need: scripts, and requests of any kind.
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>TITLE</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 276mm; margin: 0 auto;
       padding: 0 1rem 3rem }
h1 { font-size: 1.6rem; margin: 1.5rem 0 .5rem }
h2 { font-size: 1.25rem; margin: 2.2rem 0 .5rem; border-bottom: 1px solid #bbb }
h3 { font-size: 1rem; margin: 0 0 .3rem }
h2, h3, caption { break-after: avoid }
code { overflow-wrap: anywhere }
.wide { overflow-x: auto }
table { border-collapse: collapse; margin: .5rem 0 }
caption { text-align: left; color: #444; padding-bottom: .2rem }
th, td { text-align: left; vertical-align: top; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid #ddd }
tbody th { font-weight: 600; white-space: nowrap }
td:not(.n) { min-width: 9em }
td.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
figure { margin: 1.5rem 0; break-inside: avoid }
figure .wide svg { display: block }
.chart { display: inline-block; max-width: min(130mm, 100%); padding-right: 1rem; box-sizing: border-box;
         vertical-align: top }
.chart img { max-width: 100%; height: auto }
.chart .wide img { display: block; min-width: 26rem }
.chart.large { max-width: min(200mm, 100%) }
.chart.large .wide img { min-width: 44rem }
.chart.paper { max-width: 100% }
.chart.paper .wide img { min-width: 56rem }
.flags { display: inline; list-style: none; margin: 0; padding: 0 }
.flags li { display: inline-block; border: 1px solid #888; border-radius: 3px; padding: 0 .4rem; margin: .15rem .1rem }
@page { size: A4 landscape; margin: 12mm }
@media print { body { max-width: none; padding: 0 } .wide { overflow: visible } }
</style>
</head>
<body>
<main>
BODY
</main>
</body>
</html>
"""


def page(title: str, parts: Sequence[str]) -> str:
    """A whole page of these pieces of HTML; `title` is plain text."""
    head, tail = _PAGE.split("BODY")
    return head.replace("TITLE", escape(title)) + "\n".join(parts) + tail


def table(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = True) -> str:
    """A table in HTML. The first column heads its row; with `numbers`, cells that begin with one are aligned right."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in header)
    body = ""
    for first, *others in rows:
        cells = "".join(f"<td{' class=n' if numbers and _is_number(cell) else ''}>{cell}</td>" for cell in others)
        body += f'<tr><th scope="row">{first}</th>{cells}</tr>'
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{caption}"><table><caption>{caption}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _is_number(cell: str) -> bool:
    return cell == "–" or cell.removeprefix("&lt; ").lstrip("+-")[:1].isdigit()


def share(count: int, of: int) -> str:
    """A percentage, or a dash where there is nothing to take a share of."""
    return f"{100 * count / of:.1f} %" if of else "–"


def chart(svg: str, words: str) -> str:
    """An SVG picture with `words` below it as its caption and its text alternative."""
    source = base64.b64encode(svg.encode()).decode()
    image = f'<img alt="{escape(words)}" src="data:image/svg+xml;base64,{source}">'
    return f'<figure class="chart">{image}<figcaption>{escape(words)}</figcaption></figure>'


def picture(png: bytes, words: str, *, caption: str | None = None, large: bool = False, paper: bool = False) -> str:
    """A PNG picture with `words` as its text alternative, and as its caption unless there is another.

    On a phone it scrolls in its own box. A `large` one is wider, and `paper` is as wide as the page.
    """
    caption = words if caption is None else caption
    image = f'<img alt="{escape(words)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
    box = f'<div class="wide" role="region" tabindex="0" aria-label="{escape(caption)}">{image}</div>'
    kind = "chart" + " large" * large + " paper" * paper
    return f'<figure class="{kind}">{box}<figcaption>{escape(caption)}</figcaption></figure>'
