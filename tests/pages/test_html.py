import re

import pytest
from jinja2 import UndefinedError

from alexnet.pages.html import mathematics, picture, render


def test_formulas_become_mathml_and_text_stays():
    page = mathematics(r"<p>where $x > 0$ and</p> $$ y = \frac{a}{b} $$")
    assert page.count("<math") == 2
    assert page.count('display="block"') == 1
    assert "$" not in page
    assert page.startswith("<p>where ")
    assert "<mfrac>" in page


def test_a_mark_stays_with_its_formula():
    page = mathematics("by $y$: an array, of $x$ all")
    assert "</math>:</span> an array" in page
    assert page.count("together") == 1


def test_a_missing_value_is_an_error_and_not_an_empty_page():
    with pytest.raises(UndefinedError, match="verdict"):
        render("gradcheck/gradients.html", sections=[])


def test_a_picture_loses_the_head_of_its_file():
    svg = picture('<?xml version="1.0"?>\n<!DOCTYPE svg>\n<svg width="1"><text>a &lt; b</text></svg>\n')
    assert svg.startswith("<svg")
    assert re.sub(r"\s", "", svg).endswith("</svg>")
