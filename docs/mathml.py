"""Mathematics as MathML, which browsers typeset themselves: no script and no network."""

import re
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx


def typeset(text: str, display: str) -> str:
    """MathML of LaTeX; lines with & are aligned there."""
    if "&" in text:
        text = rf"\begin{{align*}}{text}\end{{align*}}"
    mathml = convert(text, display=display)
    # Browsers put space around these as around a plus. (latex2mathml 3.81)
    return re.sub(
        r"<mo[^>]*>(?=&#x0007C;|max|min)", '<mo stretchy="false" lspace="0" rspace="0">', mathml
    )


def inline(translator: Any, node: nodes.math) -> None:
    translator.body.append(typeset(node.astext(), "inline"))
    raise nodes.SkipNode


def block(translator: Any, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="math">{typeset(node.astext(), "block")}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
