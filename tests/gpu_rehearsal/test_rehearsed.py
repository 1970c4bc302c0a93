"""What waits for a real GPU has run once without one: the gpu tests, on a CUDA that computes nothing."""

from pathlib import Path
from xml.etree import ElementTree

import nullcuda
import pytest
from budgets import run
from test_on_a_card import MISMATCH

REASON = nullcuda.missing()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(REASON is not None, reason=f"no null CUDA: {REASON}"),
    pytest.mark.timeout(1800),
]
# One operation in one type: all take the same way to their comparison, and each compiles for seconds.
SOME = "(conv2d and bfloat16) or captured_run_ends and fastest or interrupted"


def test_gpu_tests_reach_their_comparisons(tmp_path: Path) -> None:
    """Nothing fails there but a comparison of numbers, which no kernel has written."""
    report, tests = tmp_path / "report.xml", str(nullcuda.HERE / "test_on_a_card.py")
    options = ["-o", "addopts=", "-o", "timeout=900", "-p", "no:cacheprovider", "-m", "gpu", "-k", SOME]
    run(["-m", "pytest", *options, f"--junitxml={report}", tests], check=False)
    cases = list(ElementTree.parse(report).iter("testcase"))
    assert cases
    for case in cases:
        ended = [end for kind in ("failure", "error", "skipped") for end in case.findall(kind)]
        assert all(MISMATCH in end.get("message", "") for end in ended), (case.get("name"), ended[0].text)
