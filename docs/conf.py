"""The documentation, built by `make docs`."""

import re
from itertools import groupby

from fluvial import __version__

project = "Fluvial"
author = "The Fluvial developers"
project_copyright = author
version = release = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]

myst_enable_extensions = ["amsmath", "dollarmath"]
nb_execution_mode = "off"

autodoc_default_options = {"members": True, "member-order": "bysource", "special-members": "__call__"}
autodoc_typehints = "signature"
add_module_names = False

smartquotes = False  # alpha' is a derivative.

html_theme = "furo"
html_title = "Fluvial"
html_copy_source = False
html_show_sphinx = False

# Docstrings are plain text: formulas indented, names in backticks, sections such as "Args:". What follows
# turns that into reStructuredText, so that no docstring has to be written in it.

_SECTION = re.compile(r"[A-Z][a-z ]+:$")
_LINK = re.compile(r"(https?://[^\s,)]+)")


def _inline(text: str) -> str:
    """One line of prose: names in backticks become literal, links stay, all else means itself."""
    pieces = []
    for position, part in enumerate(text.split("`")):
        if position % 2:
            pieces.append(f"\\ ``{part}``\\ ")
            continue
        for place, span in enumerate(_LINK.split(part)):
            pieces.append(span if place % 2 else re.sub(r"([\\*_|])", r"\\\1", span))
    return "".join(pieces)


def _items(lines: list[str]) -> list[str]:
    """The indented lines of a section: "name: what it is", going on further in."""
    shallowest = min(len(line) - len(line.lstrip()) for line in lines)
    result = []
    for line in lines:
        text = line[shallowest:]
        if text.startswith(" "):
            result.append(f"  {_inline(text.strip())}")
        else:
            name, colon, rest = text.partition(": ")
            result.append(f"* **{_inline(name)}**: {_inline(rest)}" if colon else f"* {_inline(text)}")
    return result


def _restructure(app, what, name, obj, options, lines: list[str]) -> None:
    def kind(line: str) -> str:
        if not line.strip():
            return "blank"
        return "shifted" if line.startswith("    ") else "table" if line.startswith("|") else "prose"

    if lines[:1] == ["Call self as a function."]:
        lines.clear()
    result: list[str] = []
    in_section = False
    for found, group in groupby(lines, kind):
        block = list(group)
        if found == "shifted" and in_section:
            result += ["", *_items(block), ""]
        elif found in ("shifted", "table"):
            result += ["", "::", "", *(f"    {line}" for line in block), ""]
        else:
            result += [_inline(line) for line in block]
        if found != "blank":
            in_section = found == "prose" and bool(_SECTION.match(block[-1]))
    lines[:] = result


def _skip(app, what, name, obj, skip, options) -> bool | None:
    """The fields of a named tuple are documented by its docstring."""
    return True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number") else None


def setup(app) -> None:
    app.connect("autodoc-process-docstring", _restructure)
    app.connect("autodoc-skip-member", _skip)
