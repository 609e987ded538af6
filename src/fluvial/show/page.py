"""A page of text, figures and tables in one HTML file: no script, no request, readable at any width, light and dark."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

_STYLE = """
:root { --ink: #1c2430; --soft: #5a6675; --line: #dde3ea; --paper: #ffffff; --panel: #f6f8fa; --accent: #1f6fb4; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e9ef; --soft: #9aa7b5; --line: #2c3540; --paper: #12171d; --panel: #1a2129; --accent: #6db3f2; }
  figure svg, figure img.plot { background: #fff; border-radius: 6px; }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink);
       font: 17px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 880px; margin: 0 auto; padding: 40px 20px 80px; }
h1 { font-size: 2.1em; line-height: 1.2; margin: 0 0 .3em; letter-spacing: -.01em; }
h2 { font-size: 1.35em; line-height: 1.3; margin: 2.4em 0 .5em; padding-top: .9em; border-top: 1px solid var(--line); }
h3 { font-size: 1.05em; margin: 1.8em 0 .4em; }
p { margin: .7em 0; }
.lead { font-size: 1.1em; color: var(--soft); }
a { color: var(--accent); }
figure { margin: 1.5em 0; }
figure svg, figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
figure img { image-rendering: pixelated; }
figcaption { color: var(--soft); font-size: .88em; line-height: 1.5; margin-top: .6em; }
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(230px, 100%), 1fr)); gap: 18px; }
.row.wide { grid-template-columns: repeat(auto-fit, minmax(min(340px, 100%), 1fr)); }
.row figure { margin: .6em 0; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 1.6em 0; }
.fact { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; }
.fact b { display: block; font-size: 1.45em; line-height: 1.25; }
.fact span { color: var(--soft); font-size: .84em; line-height: 1.35; display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92em; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 6px 10px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { color: var(--soft); font-weight: 600; }
pre, code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: .9em; }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px;
      overflow-x: auto; }
footer { color: var(--soft); font-size: .85em; margin-top: 4em; border-top: 1px solid var(--line); padding-top: 1em; }
"""


def heading(text: str) -> str:
    """A section's heading."""
    return f"<h2>{html.escape(text)}</h2>"


def subheading(text: str) -> str:
    """A smaller heading within a section."""
    return f"<h3>{html.escape(text)}</h3>"


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph; the text may hold inline HTML (code, em), so names from files must be escaped before."""
    return f'<p class="{kind}">{text}</p>' if kind else f"<p>{text}</p>"


def facts(items: Iterable[tuple[str, str]]) -> str:
    """A row of figures: (the number, what it is)."""
    cells = "".join(f"<div class=fact><b>{html.escape(n)}</b><span>{html.escape(w)}</span></div>" for n, w in items)
    return f"<div class=facts>{cells}</div>"


def figure(content: str, caption: str = "") -> str:
    """A figure from `svg` or `image`, with its caption."""
    told = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f"<figure>{content}{told}</figure>"


def row(figures: Iterable[str], kind: str = "") -> str:
    """Figures side by side, one below the other on a narrow screen; of kind "wide", two at the most."""
    return f'<div class="row {kind}">{"".join(figures)}</div>'


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table; on a narrow screen it scrolls sideways by itself."""
    head = "".join(f"<th>{html.escape(h)}</th>" for h in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in cells) + "</tr>" for cells in rows)
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def code(text: str) -> str:
    """A block of commands or code."""
    return f"<pre><code>{html.escape(text)}</code></pre>"


def image(picture: Any, alt: str) -> str:
    """A PIL image, embedded."""
    buffer = BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def svg(plot: Any, alt: str) -> str:
    """A matplotlib figure, embedded as SVG that scales with the page; the figure is closed."""
    import matplotlib.pyplot as plt

    buffer = BytesIO()
    plot.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(plot)
    text = buffer.getvalue().decode()
    text = text[text.index("<svg") :]
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(alt)}"', 1)


def write(path: str | os.PathLike[str], title: str, parts: Iterable[str], made: str) -> Path:
    """Writes the page, whole or not at all; `made` says in its footer how it was made."""
    body = "\n".join(parts)
    document = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body><main>\n<h1>{html.escape(title)}</h1>\n{body}\n"
        f"<footer>{html.escape(made)}</footer>\n</main></body></html>\n"
    )
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(document, encoding="utf-8")
    os.replace(temporary, path)
    return path
