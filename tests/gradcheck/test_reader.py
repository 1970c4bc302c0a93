"""Exercises, the proof of the reader's own functions, and the names of mistakes."""

import inspect
import linecache
import re
from importlib import import_module
from unittest import mock

import pytest
import torch

from alexnet.errors import UserError
from alexnet.gradcheck import diagnosis, exercises, reader
from alexnet.gradcheck.exercises import EXERCISES, exercise_named, imports, skeleton
from alexnet.layers.backend import OPERATIONS, pair_from_file
from alexnet.layers.from_file import import_file
from alexnet.layers.pair import PAIRS

OF_OPERATIONS = [exercise for exercise in EXERCISES if exercise.is_operation]


def written(exercise, changes=()):
    """The exercise's file with our own functions in it, mutated by `changes`: all that they call is copied too."""
    mutated = {c.function: "".join(linecache.getlines(c.mutated.co_filename)) for c in changes}
    found, waiting = {}, [getattr(exercise.module, name) for name in exercise.functions]
    while waiting:
        function = waiting.pop()
        ours = function.__module__.startswith(("alexnet.layers", "alexnet.optim", "alexnet.model"))
        if function in found or not ours or function.__module__.endswith((".pair", ".backend")):
            continue
        found[function] = mutated.get(function) or inspect.getsource(function)
        called = [function.__globals__.get(name) for name in function.__code__.co_names]
        waiting += [f for f in called if inspect.isfunction(f)]
    parts = [
        imports([source for f, source in found.items() if f.__module__ == module], import_module(module))
        for module in {function.__module__ for function in found}
    ]
    return "\n\n".join([*parts, *found.values()])


def proven(path, text, tmp_path, exercise):
    """(does everything hold?, what is said)"""
    path.write_text(text)
    said = []
    passed = reader.prove_mine(str(path), str(tmp_path), said.append)
    return passed, next(text for text in said if text.startswith(f"{exercise.name} "))


def with_backward(exercise, body):
    """The skeleton with a body for the function to be written."""
    missing = f'raise NotImplementedError("write {exercise.functions[-1]}")'
    return skeleton(exercise).replace(missing, body)


# ---- the files ------------------------------------------------------------------------------------------------


def test_there_is_an_exercise_for_every_operation_the_update_rule_and_the_initialisation():
    names = [exercise.name for exercise in EXERCISES]
    assert set(names) == {*OPERATIONS, "update_rule", "initialisation"}
    assert (names[0], names[-1]) == ("linear", "conv2d")
    for exercise in EXERCISES:
        assert len(exercise.hints) == 3
        assert bool(exercise.examples) == exercise.is_operation != bool(exercise.task)


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.name)
def test_our_own_functions_pass_and_the_untouched_skeleton_does_not(exercise, tmp_path):
    passed, said = proven(tmp_path / "ours.py", written(exercise), tmp_path, exercise)
    assert passed, said
    assert "every check holds" in said
    passed, said = proven(tmp_path / "untouched.py", skeleton(exercise), tmp_path, exercise)
    assert not passed
    assert f"not written yet: write {exercise.functions[-1]}" in said


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.name)
def test_a_skeleton_does_not_hold_the_solution(exercise):
    wanted = getattr(exercise.module, exercise.functions[-1])
    body = [line.strip() for line in inspect.getsource(wanted).split('"""')[-1].splitlines()]
    text = skeleton(exercise)
    formulas = [line for line in body if "backward(" in line or any(sign in line for sign in "*@/")]
    assert [line for line in formulas if line in text] == []
    assert "Backward" not in text


@pytest.mark.parametrize("exercise", OF_OPERATIONS, ids=lambda e: e.name)
def test_the_worked_number_of_a_skeleton_is_what_its_forward_gives(exercise, tmp_path, capsys):
    text = skeleton(exercise)
    exec(compile(text, exercise.name, "exec"), {"__name__": "__main__"})
    printed = " ".join(capsys.readouterr().out.split())
    assert text.rstrip().endswith(f"print(y)  # {printed}")


def test_a_file_is_never_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(exercises.write_skeleton("relu", None)) == "exercises/relu.py"
    assert exercises.write_skeleton("relu", "mine/own.py").exists()
    with pytest.raises(UserError, match=r"exercises/relu\.py exists and is not overwritten: .* into=<path>"):
        exercises.write_skeleton("relu", None)


def test_the_list_says_what_is_begun_and_what_is_proven(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = exercises.write_skeleton("relu", None)
    row = next(line for line in exercises.listing("outputs").splitlines() if " relu " in line)
    assert " begun " in row
    path.write_text(with_backward(exercise_named("relu"), "return dy * (y > 0)"))
    assert reader.prove_mine(str(path), "outputs", lambda line: None)
    assert " proven " in exercises.listing("outputs")
    path.write_text(path.read_text() + "\n")
    assert " proven " not in exercises.listing("outputs")


def test_hints_open_one_by_one():
    assert exercises.hint("tanh", 1).startswith("Hint 1 of 3. An element of x")
    assert "hint=2" in exercises.hint("tanh", 1)
    assert "Not enough" not in exercises.hint("tanh", 3)
    with pytest.raises(UserError, match="hint=4 must be 1, 2 or 3"):
        exercises.hint("tanh", 4)
    with pytest.raises(UserError, match="exercise=foo must be one of list, linear, relu"):
        exercises.hint("foo", 1)


# ---- the names of mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.name)
def test_every_known_mistake_in_the_readers_file_is_named(exercise, tmp_path):
    for number, mutant in enumerate(diagnosis.mutants_of(exercise)):
        path = tmp_path / f"{number}.py"
        path.write_text(written(exercise, mutant.changes))
        module = import_file(str(path))
        if exercise.is_operation:
            pair = reader.guarded(exercise.name, pair_from_file(str(path), exercise.name), str(path))
            with mock.patch.dict(PAIRS, {(exercise.name, "mine"): pair}):
                said = "\n".join(diagnosis.diagnosis(exercise, "mine"))
        else:
            said = "\n".join(diagnosis.diagnosis(exercise, getattr(module, exercise.functions[-1])))
        assert mutant.name in said, said
        assert '" or "' not in said, said


@pytest.mark.parametrize(
    ("mine", "fact"),
    [
        ((0.0, 2.0, 6.0), "is a constant times the right one in each case (2 to 3)"),
        ((0.5, 2.0, 6.0), "is wrong in 3 of 3 cases, in the first of them in 100 % of its elements"),
    ],
)
def test_a_gradient_of_zero_has_no_multiple_but_zero(mine, fact):
    gradients = [{"dx": torch.full((2,), value)} for value in (*mine, 0.0, 1.0, 2.0)]
    assert diagnosis.fact(gradients[:3], gradients[3:], "dx") == fact


@pytest.mark.parametrize(
    ("name", "body", "fact"),
    [
        ("relu", "return 2 * dy * (y > 0)", "dx is 2 times the right one"),
        ("tanh", "return dy * (1 - y * y * y)", "dx is wrong in"),
        ("relu", "return 0 * dy", "dx is zero"),
        ("tanh", "return (dy * (1 - y * y)).float().to(dy.dtype)", "dx is right to six digits only"),
        ("linear", "flat = dy.flatten(0, -2)\n    dw = 3 * flat.T @ x.flatten(0, -2)\n"
         "    return dy @ w, dw, flat.sum(0) if needs[2] else None", "dw is 3 times"),
    ],
)  # fmt: skip
def test_a_mistake_that_is_not_known_gets_a_fact_and_no_name(name, body, fact, tmp_path):
    exercise = exercise_named(name)
    passed, said = proven(tmp_path / "own.py", with_backward(exercise, body), tmp_path, exercise)
    assert not passed
    assert fact in said
    assert "it is not one of the known mistakes" in said
    assert "equals that" not in said


def test_the_smallest_numbers_are_shown_as_a_table(tmp_path):
    exercise = exercise_named("local_response_norm")
    body = "return dy * inverse_power(s, beta)"
    _, said = proven(tmp_path / "own.py", with_backward(exercise, body), tmp_path, exercise)
    assert "one image, 3 maps (size=3, alpha=3.0, beta=0.75, k=1.0)" in said
    assert "dx                    yours      right  difference" in said
    assert said.count("dx[0,") == 3
    assert 'your dx equals that of a known mistake: "second term dropped"' in said


# ---- the contract ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "line"),
    [
        ("return (dy * (y > 0)).half()", "dx has type torch.float16, must be torch.float64"),
        ("return dy[:, :1]", r"dx has shape \(.*\), must be \("),
        ("return None", "dx must be a tensor, not NoneType"),
        (
            "return dy.mul_(y > 0)",
            "relu_backward changes its argument dy in place: work on a copy, dy.clone()",
        ),
        ("return dy + undefined", r"line \d+: NameError: name 'undefined' is not defined"),
        ("return dy * (y > 0) + torch.rand(()) * 1e-9", "dx depends on the call before"),
    ],
)
def test_what_breaks_the_contract_is_said_in_one_line(body, line, tmp_path):
    exercise = exercise_named("relu")
    passed, said = proven(tmp_path / "own.py", with_backward(exercise, body), tmp_path, exercise)
    assert not passed
    assert [row for row in said.splitlines() if re.search(line, row)], said


def test_a_pair_that_remembers_the_call_before_is_found(tmp_path):
    text = (
        "kept = {}\n\ndef relu_forward(x):\n    y = x.clamp(min=0)\n    kept['y'] = y\n    return y, y\n\n"
        "def relu_backward(dy, y):\n    return dy * (kept['y'] > 0)\n"
    )
    _, said = proven(tmp_path / "own.py", text, tmp_path, exercise_named("relu"))
    assert "dx depends on the call before: keep what the backward needs in what the forward returns" in said


def test_files_that_cannot_be_proven_are_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        reader.prove_mine(str(tmp_path / "missing.py"), str(tmp_path))
    path = tmp_path / "broken.py"
    path.write_text("def relu_backward(dy, y)\n    return dy\n")
    with pytest.raises(UserError, match=r"broken\.py, line 1: "):
        reader.prove_mine(str(path), str(tmp_path))
    path.write_text("x = 1\n")
    with pytest.raises(
        UserError, match="the file must define at least one of linear_backward, relu_backward"
    ):
        reader.prove_mine(str(path), str(tmp_path))
    path.write_text("def relu_backward(dy, y):\n    return dy\n")
    with pytest.raises(UserError, match="must define relu_forward; exercise=relu writes a file that does"):
        reader.prove_mine(str(path), str(tmp_path))
