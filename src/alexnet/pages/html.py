"""HTML pages that open without a network: text and formulas from templates, pictures inside. The only importer of
the template engine.

A page is a Jinja template; what it shows comes in as values. Formulas are LaTeX between dollars, $inline$ or
$$displayed$$, turned into MathML, which every browser renders by itself.
"""

import re
from typing import Any

from alexnet.errors import UserError

try:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from latex2mathml.converter import convert
    from markupsafe import Markup
except ModuleNotFoundError as error:
    raise UserError(
        f"reports need {error.name}, which is not installed: pip install -e '.[plots]'"
    ) from error

FORMULA = re.compile(r"\$\$(.+?)\$\$|\$(.+?)\$([.,:;]?)", re.DOTALL)


def render(template: str, **values: Any) -> str:
    """The page of a template, named as <room>/<file>. A value the template names but nobody gave is an error."""
    environment = Environment(
        loader=PackageLoader("alexnet", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["mathematics"] = mathematics
    return environment.get_template(template).render(**values)


def mathematics(text: str) -> Markup:
    """Every $formula$ of a text that is HTML already, as MathML."""
    return Markup(FORMULA.sub(_mathml, str(text)))


def picture(svg: str) -> Markup:
    """An SVG file as part of the page: without what only files of their own may have."""
    return Markup(svg[svg.index("<svg") :])


def _mathml(match: re.Match[str]) -> str:
    displayed, inline, mark = match.groups()
    formula = convert(displayed or inline, display="block" if displayed else "inline")
    # A browser would break the line between a formula and the mark behind it.
    return f'<span class="together">{formula}{mark}</span>' if mark else formula
