"""Sphinx configuration: `make docs` builds these pages and the API reference from docstrings; a warning is an error."""

import re
from typing import Any

from docutils import nodes
from docutils.utils.math import latex2mathml

import gcpo

project = "gcpo"
author = "the gcpo contributors"
version = release = gcpo.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
nitpicky = True
# Types that signatures name, of packages whose own pages are not reached from here.
nitpick_ignore_regex = [("py:class", r"optional|.*Trainer|.*Config")]

default_role = "literal"  # docstrings write `name`, as Markdown does
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # argument lists give shapes and types in words
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["math.css"]
html_title = f"gcpo {version}"
html_math_renderer = "mathml"
linkcheck_timeout = 20


def as_restructured_text(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """
    Indented lines of a docstring's text are formulas or code, which would be taken for a quotation. What a function
    returns is a sentence, of which napoleon would take the part before a colon for a type.
    """
    result: list[str] = []
    section = ""
    for line in lines:
        if heading := re.fullmatch(r"(Args|Parameters|Returns|Raises|Yields|Attributes):", line):
            section = heading[1]
            result.append(":returns:" if section == "Returns" else line)
            continue
        starts = line.startswith("    ") and result and not result[-1].strip()
        if starts and not section and not (len(result) > 1 and result[-2].startswith("    ")):
            result += ["::", ""]
        result.append(re.sub(r"\[`~?(?:trl\.)?(\w+)`\]", r"`\1`", line))  # TRL's way to link
    lines[:] = result


def mathml(text: str, as_block: bool = False) -> str:
    """
    MathML, which browsers draw without fetching anything. Bars are drawn by math.css as a border: as an accent they
    need a font with mathematics in it, and without one they lie on the letter, so that a mean looks like what it is of.
    """
    drawn = latex2mathml.tex2mathml(text, as_block=as_block)
    bar = r'<mover accent="true">\s*(<mi>[^<]*</mi>)\s*<mo[^>]*>\u02c9</mo>\s*</mover>'
    return re.sub(bar, r'<mrow class="bar">\1</mrow>', drawn).replace("<mo>'</mo>", "<mo>\u2032</mo>")


def visit_math(translator: Any, node: nodes.math) -> None:
    translator.body.append(mathml(node.astext()))
    raise nodes.SkipNode


def visit_display_math(translator: Any, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="math">{mathml(node.astext(), as_block=True)}</div>\n')
    raise nodes.SkipNode


def setup(app: Any) -> None:
    # Before napoleon (500), which turns the sections into field lists.
    app.connect("autodoc-process-docstring", as_restructured_text, priority=400)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_display_math, None))
