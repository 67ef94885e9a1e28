"""The parts that all report pages have in common: the frame with its style, tables and lists.

A page is one file without scripts that needs no network. It is made for screens, phones, paper and dark mode.
"""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light dark; --text: #1a1a1a; --soft: #5c5c5c; --ground: #fff; --card: #f4f5f7; --line: #d5d8dd; }
@media (prefers-color-scheme: dark) {
  :root { --text: #ececec; --soft: #a9adb5; --ground: #16181c; --card: #22252b; --line: #3b3f47; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; color: var(--text); background: var(--ground);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0.5rem 0; }
h2 { font-size: 1.2rem; margin: 2rem 0 0.5rem; border-bottom: 1px solid var(--line); }
.soft, figcaption { color: var(--soft); font-size: 0.9rem; }
.tiles, .examples { display: grid; gap: 1rem; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(14rem, 1fr)); }
.figures { columns: 2 28rem; }
.figures figure { padding-bottom: 1rem; }
.figures .wide { column-span: all; }
.examples { grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); }
.tile { background: var(--card); border-radius: 0.5rem; padding: 0.75rem 1rem; }
.tile data { display: block; font-size: 2rem; font-weight: 600; line-height: 1.2; }
.alarm { border-left: 0.3rem solid #d55e00; padding-left: 0.75rem; }
figure { margin: 0; break-inside: avoid; }
figure svg { display: block; width: 100%; height: auto; max-height: 52rem; background: #ffffff; border-radius: 0.5rem; }
.examples img { display: block; max-width: 100%; image-rendering: pixelated; border-radius: 0.25rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { text-align: left; padding: 0.2rem 1rem 0.2rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
.numbers td:first-child { overflow-wrap: anywhere; min-width: 6rem; }
pre { background: var(--card); padding: 0.5rem 0.75rem; border-radius: 0.5rem; margin: 0.25rem 0 0.75rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }
@media (max-width: 32rem) {
  .numbers { font-size: 0.8rem; }
  th, td { padding-right: 0.5rem; }
}
@media print {
  :root { color-scheme: light; --text: #000; --soft: #444; --ground: #fff; --card: #f4f5f7; --line: #bbb; }
  body { max-width: none; font-size: 10pt; }
  h2 { break-after: avoid; }
  details > * { display: block; }
  details::details-content { content-visibility: visible; block-size: auto; }
}
"""


def page(title: str, intro: str, sections: Iterable[tuple[str, str]]) -> str:
    """Returns a whole page.

    Args:
        title: Title, as plain text.
        intro: HTML below the title.
        sections: Headings, and the HTML below each. Sections without content are left out.

    Example:
        >>> "<h2>Data</h2>" in page("Report", "", [("Data", "<p>digits</p>"), ("Warnings", "")])
        True
    """
    body = "\n".join(f"<section>\n<h2>{name}</h2>\n{content}\n</section>" for name, content in sections if content)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{intro}
{body}
</body>
</html>
"""


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], *, numbers: bool = False) -> str:
    """Returns a table, which scrolls on its own if the screen is too narrow.

    Args:
        head: Headings of the columns; empty for none.
        rows: Cells, as plain text or values.
        numbers: Whether most cells are numbers. Letters are then smaller on a phone.

    Example:
        >>> table((), [("images", 5)])
        '<div class="scroll"><table><tr><td>images</td><td>5</td></tr></table></div>'
    """
    top = f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>" if head else ""
    lines = (f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows)
    kind = ' class="numbers"' if numbers else ""
    return f'<div class="scroll"><table{kind}>{top}{"".join(lines)}</table></div>'


def bullets(texts: Sequence[str], kind: str = "") -> str:
    """Returns a list of texts, or an empty text for none.

    Args:
        texts: Items, as plain text.
        kind: CSS class of the items.

    Example:
        >>> bullets(["one"])
        '<ul><li>one</li></ul>'
    """
    if not texts:
        return ""
    items = "".join(f"<li{f' class={kind!r}' if kind else ''}>{escape(text)}</li>" for text in texts)
    return f"<ul>{items}</ul>"
