"""The verb `train`: fit, evaluate val once, draw the picture, close the record."""

import os
import re
import sys
import textwrap
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace

import numpy as np

from alexnet.errors import UserError
from alexnet.system import locked
from alexnet.training import assemble, compare
from alexnet.training.callbacks import Stalled
from alexnet.training.checkpoint import PREVIOUS, load
from alexnet.training.config import Train
from alexnet.training.interrupt import Interrupted, Signals, requeue
from alexnet.training.metrics import Metrics, MetricsFile, read_metrics
from alexnet.training.record import RunRecord
from alexnet.training.scoring import Result, log_probabilities, score, table

# How torch.distributed says that the process at the other end is gone.
LOST = re.compile(r"gloo|NCCL|connection (closed|reset)|broken pipe", re.IGNORECASE)


def train(config: Train, lock: bool = True) -> float | None:
    """Runs `config` to its end and returns the holdout's top-1 error, for sweepers; None after `probe=true`.

    The same configuration again resumes where it stopped, or only shows what a finished run left. Raises UserError
    where another process is at the same run; with lock=False nobody looks.
    """
    signals = Signals()
    with signals.listening():
        try:
            return _train(config, lock, signals)
        except Interrupted as stop:
            # The launcher would kill the first process for an error of this one.
            if not assemble.is_rank_zero():
                raise SystemExit(0) from None
            print(f"{stop}; the same command goes on{requeue(stop.number)}", file=sys.stderr, flush=True)
            raise


def after_sweep(configs: Sequence[Train]) -> None:
    """The runs that `train.py -m` has made, side by side."""
    directories = [assemble.run_directory(config) for config in configs]
    made = [directory for directory in dict.fromkeys(directories) if (directory / "run.json").exists()]
    if made and assemble.is_rank_zero():
        root = os.path.commonpath([directory.parent for directory in made])
        print(f"\n{compare.table(compare.compare(made))}")
        print(f"\nwith all runs below: python scripts/evaluate.py compare={root}")


def _train(config: Train, lock: bool, signals: Signals) -> float | None:
    run = assemble.build_run(config, signals)
    if config.probe:
        found = run.classifier.to(run.device).initial_probe(run.data.train_store, run.data.split[0])
        print(f"{found.table()}\n\n{textwrap.fill(found.verdict(), 100, break_long_words=False)}")
        return None
    if run.record.finished:
        if assemble.is_rank_zero():
            print(_headline(run), "This run is finished; overwrite=true starts it anew.", sep="\n")
            print(f"\n{_summary(run.record)}")
        return holdout_error(run.record)
    if not assemble.is_rank_zero():
        _fit(run, config, signals)
        return None
    with locked(run.directory) if lock else nullcontext(True) as ours:
        if not ours:
            raise UserError(
                f"{run.directory} is being trained by another process: wait for it, or choose another name=..."
            )
        if not run.record.is_current:
            raise UserError(
                f"{run.directory} was written by another process meanwhile: run the same command again"
            )
        run.start()
        print(_headline(run))
        try:
            return finish(_fit(run, config, signals), config)
        except BaseException as error:
            steps_were_made = run.trainer.global_step > 0 or any(run.checkpoints.glob("*.ckpt"))
            if lock and not steps_were_made:
                discard(run)
            elif isinstance(error, Interrupted):
                run.record.update(state="interrupted")
            raise
        finally:
            # Lightning closes every logger but this one, which would take a sweep's next run for the same.
            wandb = sys.modules.get("wandb")
            if wandb is not None and wandb.run is not None:
                wandb.finish()


def discard(run: assemble.TrainingRun) -> None:
    """Removes what the start of a run wrote: its directory would refuse the next one, whose configuration is mended."""
    for name in ("run.json", "metrics.csv", "lock"):
        (run.directory / name).unlink(missing_ok=True)
    for directory in (run.checkpoints, run.directory, run.directory.parent):
        with suppress(OSError):  # not there, or not empty
            directory.rmdir()


def _fit(run: assemble.TrainingRun, config: Train, signals: Signals) -> assemble.TrainingRun:
    """Trains. What was seen late is looked for again, step by step from the last checkpoint, to name its origin."""
    try:
        run.fit()
        return run
    except Stalled as stalled:
        if not stalled.seen_late or run.trainer.world_size > 1:
            raise
        print(f"{str(stalled).splitlines()[0]} Repeating the last steps to find where it began.", flush=True)
        again = assemble.build_run(replace(config, overwrite=False), signals, each_step=True)
        again.fit()
        return again
    except RuntimeError as error:
        if run.trainer.world_size == 1 or not LOST.search(str(error)):
            raise
        raise UserError(
            f"another process of this run has ended ({str(error).splitlines()[0][:80]}): its own error stands above, "
            "if it left one; the same command goes on from the last checkpoint"
        ) from error


def finish(run: assemble.TrainingRun, config: Train) -> float | None:
    """Results of the checkpoint with the lowest holdout error, into run.json, a picture and a table."""
    metrics = read_metrics(run.directory / "metrics.csv")
    clock = next(c for c in run.trainer.callbacks if isinstance(c, MetricsFile))  # type: ignore[attr-defined]
    network = load(run.best_checkpoint, run.resolved["backend"])
    results: dict[str, Result] = {}
    for split in ["holdout"] * run.has_holdout + ["val"] * config.evaluate:
        store = run.data.val_store if split == "val" else run.data.train_store
        rows = np.arange(len(store)) if split == "val" else run.data.split[1].numpy()
        size = config.data.eval_batch_size
        log_probs = log_probabilities(network.net, network.augment, store.images, 1, size, run.device, rows)
        results[split] = score(log_probs, store.labels[rows], split=split, name="best epoch")
    # Only a run that goes on needs it. Not after the record: nobody comes back to a finished run.
    (run.checkpoints / PREVIOUS).unlink(missing_ok=True)
    run.record.update(
        state="finished",
        seconds=round(clock.seconds(), 1),
        images_per_second=metrics.images_per_second,
        train=metrics.last_train,
        results={split: result.as_dict() for split, result in results.items()},
        checkpoint=str(run.best_checkpoint.relative_to(run.directory)),
        picture=_picture(run, config, metrics),
    )
    if "val" in results:
        found = results["val"].as_dict()
        errors = {f"val/{key}": found[key] for key in ("top1_error", "top5_error") if found[key] is not None}
        for logger in run.trainer.loggers:
            logger.log_metrics(errors, run.trainer.global_step)
            logger.finalize("success")
    print(f"\n{_summary(run.record)}")
    return holdout_error(run.record)


def holdout_error(record: RunRecord) -> float | None:
    """The top-1 error by which runs are compared; None for a data set without holdout images."""
    results = record.content["results"]
    return float(results["holdout"]["top1_error"]) if "holdout" in results else None


def _picture(run: assemble.TrainingRun, config: Train, metrics: Metrics) -> str:
    try:
        from alexnet.pages.figures import training_figure
    except ModuleNotFoundError as error:
        return f"not drawn ({error}; pip install -e '.[plots]')"
    weight = run.classifier.net.conv1.weight.detach().float().cpu()
    title = f"{config.name}, seed {config.seed}"
    path = run.directory / "training.png"
    return training_figure(metrics.curves, weight, path, config.model.towers, title).name


def _headline(run: assemble.TrainingRun) -> str:
    resolved, (train, holdout) = run.resolved, map(len, run.data.split)
    parameters = sum(p.numel() for p in run.classifier.net.parameters())
    backends = ", ".join(sorted(set(resolved["backend"].values())))
    captured = ", step captured as one CUDA graph" if resolved["captured"] else ""
    lines = [
        str(run.directory),
        f"  {parameters:,} parameters, {len(run.data.classes)} classes, "
        f"{train:,} train and {holdout:,} holdout images",
        f"  {resolved['device']}, precision {resolved['precision']}, backend {backends}{captured}",
        *(f"  {note}" for note in run.notes),
    ]
    return "\n".join(lines)


def _summary(record: RunRecord) -> str:
    content, resolved = record.content, record.content["resolved"]
    results = [Result.from_dict(values) for values in content["results"].values()]
    lines = []
    if results:
        errors = ", ".join(f"{r.split} {100 * r.top1_error.value:.2f} %" for r in results)
        protocol = "one centre view, the epoch with the lowest holdout error"
        lines += [table(results), "", f"top-1 error {errors}; {protocol}"]
    if yours := resolved.get("yours"):
        others = sorted({backend for name, backend in resolved["backend"].items() if name not in yours})
        lines.append(f"gradients   yours: {', '.join(f'{name} from {file}' for name, file in yours.items())}")
        lines.append(f"            this project's: all others ({', '.join(others)})")
    rate = content["images_per_second"]  # the median over the rows of steps; a short run has none
    lines.append(f"{content['seconds'] / 60:.1f} minutes" + f", {rate:.0f} images/s" * (rate > 0))
    files = {"picture": content["picture"], "checkpoint": content["checkpoint"], "record": "run.json"}
    lines += [f"{name:12}{record.directory / file}" for name, file in files.items()]
    return "\n".join(lines)
