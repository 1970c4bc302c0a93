"""The docstring of a layer file as a chapter of the page: each derivation stands once, in the layer file.

A paragraph stays a paragraph. An indented block becomes a table with one row a line, whose cells are what three or more
spaces set apart. A formula, and an indexed symbol such as x[n,i] inside a sentence, becomes LaTeX between
dollars, which pages.html turns into MathML.
"""

import re
from html import escape
from inspect import cleandoc
from types import ModuleType

GREEK = ("alpha", "beta", "epsilon", "lambda")
FUNCTIONS = ("exp", "log", "tanh", "sinh", "cosh", "max", "min")
KNOWN = (*GREEK, *FUNCTIONS, "sum", "floor", "lse", "loss")
RELATION = re.compile(r"\s(?:=|<-)\s")
INDEXED = re.compile(r"(?<![\w\]`])(d?[A-Za-z]|lse|loss)\[([^\]]+)\](?:\^-?\w+)?")  # x[c], s[c]^-beta
HEAD = re.compile(
    r"(Forward|Backward|How|Who|Where|Ties|Size|Memory|Groups|Shapes|The mask)\b(?:[^.:;]|\.\d){0,60}?[.:,](?!\d)"
)
TOKEN = re.compile(r"\s+|<-|[<>]=|[A-Za-z]+'s|[A-Za-z]+['*]?|\d[\d.]*|.")


def chapter(module: ModuleType) -> str:
    """HTML with formulas between dollars; the title line of the docstring is left out."""
    blocks = cleandoc(module.__doc__ or "").split("\n\n")
    return "\n".join(_block(block) for block in blocks[1:])


def title(module: ModuleType) -> str:
    """The first sentence of the docstring."""
    return " ".join(cleandoc(module.__doc__ or "").split("\n\n")[0].split())


def _block(block: str) -> str:
    if block.startswith(" "):
        return _table(block.splitlines())
    text = " ".join(line.strip() for line in block.splitlines())
    head = HEAD.match(text)
    bold = head.group() if head else ""
    return f"<p>{f'<b>{_prose(bold)}</b>' if bold else ''}{_prose(text[len(bold) :])}</p>"


def _prose(text: str) -> str:
    text = escape(text, quote=False)
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    text = re.sub(r"(?<![\w*])\*(\w[^*<]*?\w|\w)\*(?![\w*])", r"<em>\1</em>", text)
    return INDEXED.sub(lambda match: f"${latex(match.group())}$", text)


def _table(lines: list[str]) -> str:
    rows = []
    for line in lines:
        # The two sides of an equation that was aligned at its = are one cell.
        parts = re.split(r"\s{3,}", re.sub(r"\s+=\s+", " = ", line.strip()))
        rows.append([f"${latex(part)}$" if _is_formula(part) else _prose(part) for part in parts])
    columns, html = max(map(len, rows)), ""
    for *cells, last in rows:
        span = f' colspan="{columns - len(cells)}"' if len(cells) + 1 < columns else ""
        html += "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + f"<td{span}>{last}</td></tr>"
    return f'<div class="scroll"><table class="formulas">{html}</table></div>'


def _is_formula(cell: str) -> bool:
    """Whether a cell is an equation and not a sentence that mentions one: no words stand on its left side."""
    sides = RELATION.split(f" {cell}")
    words = [word for word in re.findall(r"[A-Za-z]{3,}", sides[0]) if word not in KNOWN]
    return len(sides) > 1 and ";" not in cell[:-1] and (not words or cell.startswith("∂"))


def latex(formula: str) -> str:
    """One line of a derivation as LaTeX: x[n,i] is an index, alpha a letter, sum_{...} a sum, s^-beta a power."""
    formula = re.sub(r"floor\(([^()]*)\)", r"⌊\1⌋", formula)
    formula = re.sub(r"∂(\S+?)/∂([\w*]+(?:\[[^\]]*\])?)", r"⟦∂ \1⟧⟦∂ \2⟧", formula)
    formula = re.sub(r"\(([\w\s]+)/([\w^ ]+)\)", r"⟦\1⟧⟦\2⟧", formula)
    tokens = TOKEN.findall(formula)
    text = re.sub(r" \} +\\text\{ ", " ", _sequence(tokens))  # one \text{} for a run of words
    return re.sub(r"\s+", " ", text).strip()


def _sequence(tokens: list[str]) -> str:
    """Translates tokens from the left until they are used up."""
    text, before = "", ""
    while tokens:
        token = tokens.pop(0)
        if token == "[" and (before[-1:].isalnum() or before[-1:] in "'*"):
            text += "_{" + _until("]", tokens) + "}"
        elif token in ("_", "^") and tokens and tokens[0] in "{(":
            closing = {"{": "}", "(": ")"}[tokens.pop(0)]
            text += token + "{" + _until(closing, tokens) + "}"
        elif token == "^" and tokens and tokens[0] == "-":
            text += "^{-" + _symbol("".join(tokens[1])) + "}"
            del tokens[:2]
        elif token in ("_", "^") and tokens and tokens[0] != "=":
            text += token + "{" + _symbol(tokens.pop(0)) + "}"
        elif token == "⟦":
            above = _until("⟧", tokens)
            tokens.pop(0)
            text += rf"\frac{{{above}}}{{{_until('⟧', tokens)}}}"
        else:
            text += _symbol(token)
        before = token
    return text


def _until(closing: str, tokens: list[str]) -> str:
    """What stands before the closing bracket that matches, translated; the bracket is taken too."""
    opening = {"]": "[", "}": "{", ")": "(", "⟧": "⟦"}[closing]
    inner: list[str] = []
    depth = 1
    while tokens and depth:
        token = tokens.pop(0)
        depth += (token == opening) - (token == closing)
        if depth:
            inner.append(token)
    return _sequence(inner)


SIGNS = {
    "<-": r"\leftarrow ", "<=": r"\le ", ">=": r"\ge ", "<": r"\lt ", ">": r"\gt ", "∂": r"\partial ",
    "⌊": r"\lfloor ", "⌋": r"\rfloor ", "{": r"\{", "}": r"\}", "sum": r"\sum ", "in": r"\in ",
}  # fmt: skip


def _symbol(token: str) -> str:
    if token.isspace():
        return " "
    if token in SIGNS:
        return SIGNS[token]
    if token.endswith(("'", "*")) and token[:-1].isalpha():  # a transpose, a reflected window
        return _symbol(token[:-1]) + (r"^{\top}" if token.endswith("'") else "^{*}")
    if token in GREEK or token in FUNCTIONS:
        return rf"\{token} "
    is_word = token[0].isalpha() and len(token) > 1 and not re.fullmatch(r"d[A-Za-z]", token)
    return rf"\text{{ {token} }}" if is_word else token
