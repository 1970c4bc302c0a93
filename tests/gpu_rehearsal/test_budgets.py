"""A training step on a CUDA that computes nothing stays within its budgets. Needs gcc and a CUDA build of torch."""

import json

import nullcuda
import pytest
from budgets import BUDGETS, SMALL_CASES, Budget, figures, run

REASON = nullcuda.missing()
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=f"no null CUDA: {REASON}"),
    pytest.mark.timeout(900),  # the compilers of two networks, when nothing is in the cache
]


def parameter(budget: Budget) -> object:
    marks = [] if budget.case in SMALL_CASES else [pytest.mark.slow]
    return pytest.param(budget, marks=marks, id=f"{budget.case}-{budget.figure.replace(' ', '_')}")


@pytest.mark.parametrize("budget", [parameter(budget) for budget in BUDGETS])
def test_a_step_stays_within_its_budget(budget: Budget) -> None:
    found = figures(budget.case)
    why = json.dumps(found["details"], indent=1)
    assert found[budget.figure] <= budget.most, (
        f"{budget.case}, {budget.figure}: {found[budget.figure]}\n{why}"
    )


@pytest.mark.slow
def test_a_captured_step_is_one_replay() -> None:
    found = figures("captured")
    assert found["replays"] == 1
    assert found["products"] == 0, "products outside the graph"


def test_a_wait_is_seen_with_its_line(tmp_path) -> None:
    """The counts of zero above mean something: the log sees each kind of wait, and what capture forbids."""
    script = tmp_path / "waits.py"
    script.write_text(
        "import json, torch\n"
        "from nullcuda import Log\n"
        "x = torch.ones(4, device='cuda')\n"
        "with Log() as log:\n"
        "    x.sum().item()\n"
        "    torch.ones(4).to('cuda')\n"
        "    try:\n"
        "        with torch.cuda.graph(torch.cuda.CUDAGraph()): x.sum().item()\n"
        "    except RuntimeError: pass\n"
        "print(json.dumps(log.events))\n"
    )
    events = json.loads(run([str(script)]).splitlines()[-1])
    where = [text for kind, text in events if kind == "where"]
    assert [text for kind, text in events if kind == "violation"], events
    assert any("waits.py:5" in text for text in where), events
    assert any("waits.py:6" in text for text in where), events
