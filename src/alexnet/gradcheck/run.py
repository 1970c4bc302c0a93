"""Runs every check with every backend that was asked for, prints one table, and says whether all checks passed."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import chain, product
from pathlib import Path

import torch

from alexnet.errors import UserError
from alexnet.gradcheck import exercises, reader
from alexnet.gradcheck.cases import Case
from alexnet.gradcheck.checks import Result, results_of
from alexnet.gradcheck.config import CheckGradients
from alexnet.gradcheck.mutants import Kill, try_to_kill
from alexnet.gradcheck.mutants_of_reference import MUTANTS
from alexnet.gradcheck.network import NETWORKS, STEPS_NET, network_results, step_results
from alexnet.gradcheck.operations import ALL
from alexnet.gradcheck.rules import rule_results
from alexnet.layers import Backend, Backends
from alexnet.layers.backend import OPERATIONS
from alexnet.layers.from_file import is_file
from alexnet.system import command_line, environment, write_json

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
Say = Callable[[str], None]


@dataclass
class Proof:
    """All results, and what was skipped."""

    results: list[Result] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    kills: list[Kill] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def failures(self) -> list[Result]:
        return [result for result in self.results if not result.passed]

    @property
    def survivors(self) -> list[Kill]:
        return [kill for kill in self.kills if not kill.killed_by]

    @property
    def passed(self) -> bool:
        return bool(self.results) and not self.failures and not self.survivors


def check(config: CheckGradients, say: Say = print) -> bool:
    """What was asked for: an exercise, the proof of the reader's file, or the proof of ours. False if it failed."""
    if config.mine:
        return reader.prove_mine(config.mine, config.output_dir, say)
    if config.exercise is None:
        return prove(config, say).passed
    if config.exercise == "list":
        say(exercises.listing(config.output_dir))
    elif config.hint is not None:
        say(exercises.hint(config.exercise, config.hint))
    else:
        path = exercises.write_skeleton(config.exercise, config.into)
        say(f"{path}\nhints  exercise={config.exercise} hint=1\nproof  mine={path}")
    return True


def prove(config: CheckGradients, say: Say = print) -> Proof:
    """Checks what `config` asks for, prints each row as soon as it is known, and writes results.json."""
    started, proof = time.perf_counter(), Proof()
    _operations(config, proof, say)
    if not config.operations:
        _networks(config, proof, say)
    if config.mutants:
        _mutants(config, proof, say)
    if not proof.results:
        raise UserError(f"there is nothing to check: {'; '.join(proof.skipped) or 'no case is left'}")
    proof.seconds = time.perf_counter() - started

    verdict = f"{len(proof.results):,} checks in {proof.seconds:.0f} s, {len(proof.failures)} failed"
    most = max((r.share for r in proof.results if r.passed), default=None)
    verdict += "" if most is None else f"; the largest error is {100 * most:.1f} % of its bound"
    for line in (*proof.skipped, *map(failure_line, proof.failures[:20]), f"\n{verdict}"):
        say(line)
    if proof.kills:
        say(f"{len(proof.kills)} mutants, {len(proof.survivors)} survived")
    _write(config, proof, verdict, say)
    return proof


def _write(config: CheckGradients, proof: Proof, verdict: str, say: Say) -> None:
    """results.json, and the lesson where its tools are installed (they are extras: the checks need none)."""
    part = "+".join(config.operations)  # the whole proof is not replaced by a part of it
    directory = Path(config.output_dir) / "check_gradients" / part
    directory.mkdir(parents=True, exist_ok=True)
    content = {
        "command": command_line(),
        **environment(),
        "passed": proof.passed,
        "seconds": proof.seconds,
        "results": [result.row() for result in proof.results],
        "skipped": proof.skipped,
        "kills": [{**kill.__dict__, "killed": bool(kill.killed_by)} for kill in proof.kills],
    }
    write_json(directory / "results.json", content)
    say(f"results  {directory / 'results.json'}")
    try:
        from alexnet.gradcheck.lesson import write_lesson
    except (ModuleNotFoundError, UserError) as error:
        say(f"skipped  report.html: {error}")
        return
    write_lesson(directory / "report.html", proof.results, proof.kills, verdict, content)
    say(f"report   {directory / 'report.html'}")


def devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


# ---- what is checked ------------------------------------------------------------------------------------------


def _operations(config: CheckGradients, proof: Proof, say: Say) -> None:
    say(OPERATION_HEAD)
    for device, operation in product(devices(), ALL):
        if config.operations and operation.name not in config.operations:
            continue
        for backend in backends_for(operation.name, config, device, proof.skipped):
            started = time.perf_counter()
            found: list[Result] = []
            for case in operation.cases:
                if case.kind != "large" or config.full:
                    found += results_of(operation, case, backend, device, _dtypes(case, backend, config.full))
            proof.results += found
            say(operation_row(found, time.perf_counter() - started))


def _dtypes(case: Case, backend: str, full: bool) -> tuple[torch.dtype, ...]:
    """Every type; but a compiled pair needs a graph for each shape and type, and each takes seconds to compile. So
    without full=true its awkward cases are checked in float64 only, and the paper's shapes in bfloat16 only, in which
    `fast` trains; the networks check them in float64."""
    if full or backend in (Backend.reference, Backend.triton) or is_file(backend):
        return DTYPES
    return {"ordinary": DTYPES, "awkward": DTYPES[:1]}.get(case.kind, DTYPES[2:])


def backends_for(operation: str, config: CheckGradients, device: str, skipped: list[str]) -> list[str]:
    """What the configuration resolves to here, with full=true every other pair; those not available go to `skipped`."""
    chosen = [getattr(config.backend, operation) or config.backend.default]
    chosen += [Backend.reference, Backend.compiled, Backend.triton] if config.full else []
    found: list[str] = []
    for choice in chosen:
        try:
            backend = replace(Backends(), **{operation: choice}).resolve(device)[operation]
        except UserError as error:
            skipped.append(f"skipped  {operation}, {choice} on {device}: {error}")
            continue
        if backend == Backend.native:
            why = "torch's own gradient is what the others are compared with"
            skipped.append(f"skipped  {operation}, native: {why}")
        elif backend == Backend.triton and device != "cuda":
            skipped.append(f"skipped  {operation}, triton on {device}: its kernels need a CUDA device")
        elif backend not in found:
            found.append(backend)
    return found


def _networks(config: CheckGradients, proof: Proof, say: Say) -> None:
    """The networks with each mapping of backends, and the rules, which have none."""
    say(f"\n{ROW_HEAD}")
    for device in devices():
        for backends in network_backends(config, device):
            for name, model in NETWORKS.items():
                directions, *parameters = network_results(name, model, backends, device)
                proof.results += [directions, *parameters]
                say(result_row(directions))
                worst = max(parameters, key=lambda result: result.share)
                say(result_row(replace(worst, what=f"{len(parameters)} gradients; {worst.what}")))
            steps = step_results("ten steps", STEPS_NET, backends, device, both_types=True)
            if config.full:
                net = NETWORKS["code145, 224 px"]
                steps = chain(steps, step_results("ten steps, code145", net, backends, device))
            for result in steps:
                proof.results.append(result)
                say(result_row(result))
    for result in rule_results():
        proof.results.append(result)
        say(result_row(result))


def network_backends(config: CheckGradients, device: str) -> list[dict[str, str]]:
    """The mapping that training would use, and with full=true one for every other pair."""
    per_operation = {name: backends_for(name, config, device, []) or ["reference"] for name in OPERATIONS}
    found = [{name: choices[0] for name, choices in per_operation.items()}]
    for backend in (Backend.reference, Backend.compiled, Backend.triton) if config.full else ():
        mapping = {name: str(backend) if backend in each else each[0] for name, each in per_operation.items()}
        if mapping not in found:
            found.append(mapping)
    return found


def _mutants(config: CheckGradients, proof: Proof, say: Say) -> None:
    """The mutants of the pairs that are checked here, and of the rules, which are the same with every pair."""
    say(f"\n{KILL_HEAD}")
    chosen = {name: backends_for(name, config, "cpu", []) for name in OPERATIONS}
    found = [*MUTANTS]
    if {Backend.compiled, Backend.library} & {backend for each in chosen.values() for backend in each}:
        from alexnet.gradcheck.mutants_of_compiled import MUTANTS_OF_COMPILED  # imports the compiler

        found += MUTANTS_OF_COMPILED
    for mutant in found:
        if config.operations and mutant.where not in config.operations:
            continue
        if mutant.where not in OPERATIONS or mutant.backend in chosen[mutant.where]:
            proof.kills.append(try_to_kill(mutant, compiled=config.full))
            say(kill_row(proof.kills[-1]))


# ---- what is printed ------------------------------------------------------------------------------------------

OPERATION_HEAD = (
    f"{'':20} {'':10} {'':5} {'':5} {'differences':>12} {'autograd':>9} {'identity':>9} {'error / bound':>15}\n"
    f"{'operation':20} {'backend':10} {'on':5} {'cases':>5} {'slope|error':>12} {'float64':>9} {'float64':>9}"
    f" {'fp32':>7} {'bf16':>7}   {'s':>4}"
)
ROW_HEAD = f"{'checked':31} {'backend':10} {'on':5} {'':28} {'error':>8} {'bound':>6} {'ratio':>6}"
KILL_HEAD = f"{'mutant (a differences, b autograd, c identity)':61} {'':3} killed on"


def operation_row(results: list[Result], seconds: float) -> str:
    """Worst value over the cases of one operation, backend and device."""

    def largest(check: str, dtype: str, of: str) -> float:
        return max((getattr(r, of) for r in results if (r.check, r.dtype) == (check, dtype)), default=0.0)

    first = results[0]
    differences = [r for r in results if r.check == "differences"]
    slopes = [r for r in differences if r.what.startswith("slope")]
    worst = max(slopes or differences, key=lambda r: r.share)
    shown = worst.what.split()[1] if slopes else f"{worst.value:.0e}"
    values = [f"{largest(check, 'float64', 'value'):9.0e}" for check in ("autograd", "identity")]
    shares = [f"{percent(largest('autograd', dtype, 'share')):>7}" for dtype in ("float32", "bfloat16")]
    count = len({r.case for r in results})
    mark = "" if all(r.passed for r in results) else " FAILED"
    return (
        f"{first.operation:20} {first.backend:10.10} {first.device:5} {count:5} {shown:>12} "
        f"{' '.join(values)} {' '.join(shares)}   {seconds:4.1f}{mark}"
    )


def result_row(result: Result) -> str:
    mark = "" if result.passed else " FAILED"
    numbers = f"{result.value:8.1e} {result.bound:6.0e} {percent(result.share)}{mark}"
    if result.check == "rule":  # it has no backend: its name takes the room
        return f"{f'{result.operation}: {result.case}':77} {numbers}"
    what = "random directions" if result.check == "directions" else result.what
    return f"{result.operation[:31]:31} {result.backend:10.10} {result.device:5} {what:28} {numbers}"


def percent(share: float) -> str:
    """Six characters at most."""
    return f"{100 * share:5.1f}%" if share < 10 else ">999%"  # a NaN too


def kill_row(kill: Kill) -> str:
    name = f"{kill.where}: {kill.name}"
    return f"{name[:61]:61} {kill.letters:3} {kill.case if kill.killed_by else 'SURVIVED'}"


def failure_line(result: Result) -> str:
    where = f"{result.operation}, {result.backend} on {result.device}, {result.dtype}, {result.case}"
    what = f" ({result.what})" if result.what else ""
    return f"FAILED   {where}: {result.check}{what} {result.value:.2e}, bound {result.bound:.0e}"
