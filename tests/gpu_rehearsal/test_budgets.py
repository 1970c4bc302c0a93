"""A training step on a CUDA that computes nothing stays within its budgets. Needs gcc and a CUDA build of torch."""

import json
from pathlib import Path

import nullcuda
import pytest
from budgets import BUDGETS, Budget, figures, run
from nullcuda import Event

REASON = nullcuda.missing()
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=f"no null CUDA: {REASON}"),
    pytest.mark.timeout(900),  # the compilers of two networks, when nothing is in the cache
]


@pytest.mark.slow
@pytest.mark.parametrize("budget", BUDGETS, ids=lambda b: f"{b.case}-{b.figure.replace(' ', '_')}")
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


FORBIDDEN = """
import contextlib, json, torch, triton
from nullcuda import Log

@triton.jit
def nothing(x):
    pass

x = torch.ones(40, 32, 8, 8, device="cuda", dtype=torch.bfloat16)
with Log() as log:
    x.sum().item()
    torch.ones(4).to("cuda", non_blocking=True)
    torch.mm(x.flatten()[1:1025].view(32, 32), x[0].view(32, 64))
    torch.nn.functional.conv2d(x, x[:, :, :3, :3].contiguous())
    with contextlib.suppress(RuntimeError):
        nothing[(1, 65536)](x)
    with contextlib.suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph()):
        x.sum().item()
print(json.dumps(log.events))
"""


def test_the_log_sees_what_the_budgets_forbid(tmp_path: Path) -> None:
    """Counts of zero mean something: each kind of mistake, made on purpose, is in the log, waits with their line."""
    script = tmp_path / "forbidden.py"
    script.write_text(FORBIDDEN)
    events = [Event(*event) for event in json.loads(run([str(script)]).splitlines()[-1])]
    waits = " ".join(event.text for event in events if event.kind == "where")
    assert "forbidden.py:11" in waits, ".item()"
    assert "forbidden.py:12" in waits, "a copy from pageable memory"
    assert any(event.kind == "product" and "align 2 " in event.text for event in events)
    assert any(event.kind == "convolution" and "NCHW" in event.text for event in events)
    assert any(event.kind == "bad-grid" for event in events)
    assert any(event.kind == "violation" for event in events)
