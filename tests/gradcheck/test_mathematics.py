"""The map, the glossary and the walk: every place resolves, every number is computed."""

import pytest
import torch

from alexnet.gradcheck.mathematics import GLOSSARY, MAP, located, numbers
from alexnet.gradcheck.walk import walk

IDEAS = [idea for branch in MAP.values() for idea in branch]


@pytest.mark.parametrize("idea", IDEAS, ids=lambda idea: idea.name)
def test_the_place_of_an_idea_is_a_definition_in_the_source(idea):
    from pathlib import Path

    path, _, line = located(idea.place).rpartition(":")
    root = Path(__file__).parents[2]
    name = idea.place.split("::")[1]
    assert name in (root / path).read_text().splitlines()[int(line) - 1]


def test_a_place_that_is_gone_is_an_error():
    with pytest.raises(LookupError, match=r"layers/relu\.py defines no gone"):
        located("layers/relu.py::gone")


def test_the_map_covers_the_three_branches_and_its_numbers_are_computed():
    assert [len(ideas) >= 8 for ideas in MAP.values()] == [True] * 3
    assert len({idea.name for idea in IDEAS}) == len(IDEAS)
    shown = [idea.number.format(**numbers()) for idea in IDEAS]
    assert all(any(character.isdigit() for character in number) or "two" in number for number in shown)
    assert all("{" in idea.number or idea.name == "Chain rule" for idea in IDEAS)
    assert "37,752,832" in shown[1]


def test_every_term_of_the_glossary_has_five_cells_and_a_meaning():
    assert {len(row) for row in GLOSSARY} == {5}
    assert all(row[2] for row in GLOSSARY)
    terms = [row[0].lower() for row in GLOSSARY]
    assert terms == sorted(terms)
    assert {"convolution", "adjoint", "logit", "nat", "feature map", "group", "holdout", "error"} <= set(
        terms
    )


def test_the_walk_ends_with_the_numbers_of_autograd_and_a_lower_loss():
    steps, compared = walk()
    assert {name for name, *_ in compared} == {"L", "dw1", "db1", "dw2", "db2", "dx"}
    for name, ours, theirs in compared:
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15, msg=name)
    losses = [step["L"] for step in steps if "L" in step]
    assert losses[1] < losses[0]


def test_every_number_of_the_walk_but_its_inputs_depends_on_them(monkeypatch):
    from alexnet.gradcheck import walk as module

    before, _ = walk()
    monkeypatch.setattr(module, "IMAGE", module.IMAGE * 1.5)
    after, _ = walk()
    for old, new in zip(before[1:], after[1:], strict=True):
        assert any(not torch.equal(old[name], new[name]) for name in old), list(old)
