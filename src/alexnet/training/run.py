"""The verb `train`: fit, evaluate val once, draw the picture, close the record."""

import textwrap
from contextlib import nullcontext
from typing import Any

import torch

from alexnet.data.module import ImageData
from alexnet.errors import UserError
from alexnet.system import locked
from alexnet.training import assemble
from alexnet.training.checkpoint import load
from alexnet.training.config import Train
from alexnet.training.metrics import read_metrics
from alexnet.training.probe import probe
from alexnet.training.record import RunRecord
from alexnet.training.scoring import Result, log_probabilities, score, table

PROBE_IMAGES = 64


def train(config: Train, lock: bool = True) -> float | None:
    """Runs `config` to its end and returns the holdout's top-1 error, for sweepers; None after `probe=true`.

    The same configuration again resumes where it stopped, or only shows what a finished run left. Raises UserError
    where another process is at the same run; with lock=False nobody looks.
    """
    run = assemble.training(config)
    if config.probe:
        _probe(run)
        return None
    if run.record.finished:
        if assemble.is_rank_zero():
            print(_headline(run))
        print(f"This run is finished; overwrite=true starts it anew.\n\n{_summary(run.record)}")
        return holdout_error(run.record)
    if not assemble.is_rank_zero():
        run.fit()
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
        run.start(config.overwrite)
        print(_headline(run))
        run.fit()
        return finish(run, config)


def finish(run: assemble.Training, config: Train) -> float | None:
    """Results of the checkpoint with the lowest holdout error, into run.json, a picture and a table."""
    rows = read_metrics(run.directory / "metrics.csv")
    splits = ["holdout"] * run.has_holdout + ["val"] * config.evaluate
    results = {split: _evaluated(run, split) for split in splits}
    run.record.update(
        state="finished",
        seconds=round(run.seconds, 1),
        images_per_second=_median(
            [float(row["images_per_second"]) for row in rows if row["images_per_second"]]
        ),
        train={name: float(rows[-1][f"train/{name}"]) for name in ("loss", "top1_error")} if rows else {},
        results={split: result.as_dict() for split, result in results.items()},
        checkpoint=str(run.best_checkpoint.relative_to(run.directory)),
        picture=_picture(run, config, rows),
    )
    print(f"\n{_summary(run.record)}")
    return holdout_error(run.record)


def holdout_error(record: RunRecord) -> float | None:
    """The top-1 error by which runs are compared; None for a data set without holdout images."""
    results = record.content["results"]
    return float(results["holdout"]["top1_error"]) if "holdout" in results else None


def _picture(run: assemble.Training, config: Train, rows: list[dict[str, str]]) -> str:
    try:
        from alexnet.figures import training_figure
    except ModuleNotFoundError as error:
        return f"not drawn ({error}; pip install -e '.[plots]')"
    weight = run.classifier.net.conv1.weight.detach().float().cpu()
    title = f"{config.name}, seed {config.seed}"
    path = run.directory / "training.png"
    return training_figure(rows, weight, path, config.model.towers, title).name


def _evaluated(run: assemble.Training, split: str) -> Result:
    classifier = load(run.best_checkpoint, run.resolved["backend"])
    return evaluate_split(classifier, run.data, split, views=1, device=run.device, name="best epoch")


def evaluate_split(
    classifier: Any, data: ImageData, split: str, views: int, device: torch.device, name: str = ""
) -> Result:
    """One network on one split of its own data."""
    store = data.val_store if split == "val" else data.train_store
    index = None if split == "val" else data.split[split == "holdout"].numpy()
    labels = store.labels if index is None else store.labels[index]
    log_probs = log_probabilities(
        classifier.net, classifier.augment, store.images, views, data.config.eval_batch_size, device, index
    )
    return score(log_probs, labels, split=split, views=views, name=name)


def _probe(run: assemble.Training) -> None:
    trained = run.data.split[0].numpy()
    rows = trained[:: max(1, len(trained) // PROBE_IMAGES)][
        :PROBE_IMAGES
    ]  # from all over: stores go by class
    store = run.data.train_store
    classifier = run.classifier.to(run.device)
    images = classifier.augment.centre(torch.from_numpy(store.images[rows]).to(run.device))
    found = probe(classifier.net, images, torch.from_numpy(store.labels[rows]).to(run.device))
    print(f"{found.table()}\n\n{textwrap.fill(found.verdict(), 100, break_long_words=False)}")


def _headline(run: assemble.Training) -> str:
    resolved = run.resolved
    parameters = sum(p.numel() for p in run.classifier.net.parameters())
    backends = sorted(set(resolved["backend"].values()))
    lines = [
        str(run.directory),
        f"  {parameters:,} parameters, {len(run.data.classes)} classes, "
        f"{len(run.data.split[0]):,} train and {len(run.data.split[1]):,} holdout images",
        f"  {resolved['device']}, precision {resolved['precision']}, backend {', '.join(backends)}"
        + (", step captured as one CUDA graph" if resolved["captured"] else ""),
        *(f"  {note}" for note in run.notes),
    ]
    if run.last_checkpoint and not run.record.finished:
        lines.append(f"  resuming from {run.last_checkpoint}")
    return "\n".join(lines)


def _summary(record: RunRecord) -> str:
    content = record.content
    results = [Result.from_dict(values) for values in content["results"].values()]
    lines = []
    if results:
        errors = ", ".join(f"{r.split} {100 * r.top1_error.value:.2f} %" for r in results)
        protocol = "one centre view, the epoch with the lowest holdout error"
        lines += [table(results), "", f"top-1 error {errors}; {protocol}"]
    return "\n".join(
        [
            *lines,
            f"{content['seconds'] / 60:.1f} minutes, {content['images_per_second']:.0f} images/s",
            f"picture     {record.directory / content['picture']}",
            f"checkpoint  {record.directory / content['checkpoint']}",
            f"record      {record.directory / 'run.json'}",
        ]
    )


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2] if values else 0.0
