"""Dataclasses -> objects: what stands between a configuration and a run. The only caller of hydra's instantiate."""

import os
import shutil
import sys
import warnings
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from alexnet import system
from alexnet.cli import plain
from alexnet.data.module import ImageData, check_batch_size
from alexnet.data.prepare import PrepareConfig, prepare
from alexnet.errors import UserError
from alexnet.layers.backend import AUTO, Backend
from alexnet.layers.from_file import is_file, label
from alexnet.optim import Schedule
from alexnet.system import MASTER_WEIGHTS, TF32, full_precision_name
from alexnet.training import callbacks as ours
from alexnet.training.capture import CapturedStrategy, obstacle
from alexnet.training.checkpoint import BEST, CHECKPOINTS, LAST, resume_point
from alexnet.training.classifier import Classifier
from alexnet.training.config import Freeze, Train, single_device
from alexnet.training.fine_tune import take_weights
from alexnet.training.interrupt import Signals
from alexnet.training.metrics import MetricsFile
from alexnet.training.network import Speedups
from alexnet.training.record import RunRecord, open_record, refuse_other

# Keys that do not change what a run computes: a run may be moved, and resumed with another bar or logger.
RUNTIME_ONLY = {
    "": "output_dir data_dir probe overwrite logger watchdog watchdog_steps evaluate checkpoint_every",
    "data": "root resident num_workers",
    "trainer": "enable_progress_bar profiler keep_freed_memory capture benchmark",
}
# Launches in one uncaptured training step of model=tiny at batch 128, counted on a CUDA that computes nothing
# (tests/gpu_rehearsal; not a measure of time).
LAUNCHES = {Backend.reference: 1601, Backend.fast: 138}
SMALL_CROP = 0.3  # of an image's area


@dataclass
class TrainingRun:
    """Everything of one run, ready to start."""

    classifier: Classifier
    data: ImageData
    trainer: pl.Trainer
    record: RunRecord
    directory: Path
    resolved: dict[str, Any]  # backends, precision and device on this machine
    on_record: dict[str, Any]  # what else its record says of its start
    notes: list[str]  # what the backend means here, for the headline
    same_run: dict[str, Any]  # what decides whether another run is this one
    overwrite: bool

    @property
    def best_checkpoint(self) -> Path:
        """The epoch with the lowest holdout error; the last one where there is no holdout."""
        return self.checkpoints / (BEST if self.has_holdout else LAST)

    @property
    def checkpoints(self) -> Path:
        return self.directory / CHECKPOINTS

    @property
    def device(self) -> torch.device:
        """Where the backends were resolved for; after `fit`, lightning has moved the module to the CPU."""
        return torch.device(self.resolved["device"])

    @property
    def has_holdout(self) -> bool:
        return len(self.data.split[1]) > 0

    @cached_property
    def resume_point(self) -> Path | None:
        """The checkpoint to go on from. Raises UserError if it is of another run.

        With `overwrite` no process looks for one: the first may be deleting it.
        """
        if self.overwrite:
            return None
        path, content, warning = resume_point(self.directory)
        if path is None:
            return None
        there, here = content.get("identity"), self.same_run
        if there is None:
            # Until November 2026 a checkpoint knew its network alone. The backend may be another one.
            there = {**content["hyper_parameters"], "backend": {}}
            here = _shared(there, self.classifier.arguments)
        refuse_other(f"{path} is of a run", there, here)
        if is_rank_zero():
            print(*[warning] * bool(warning), f"resuming from {path}", sep="\n", flush=True)
        return path

    def start(self) -> None:
        """Writes run.json; with `overwrite` all else in the directory goes. For the process that has its lock."""
        if self.overwrite:
            clear(self.directory)
        _ = self.resume_point  # raises before anything is written
        self.record.start(self.resolved, **self.on_record)

    def fit(self) -> None:
        """Trains, from the last checkpoint if there is one."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*mid-epoch.*|.*exists and is not empty.*")
            self.trainer.fit(self.classifier, self.data, ckpt_path=self.resume_point, weights_only=True)


def _shared(there: Any, here: Any) -> Any:
    """`here` without the keys that `there` does not have: they are newer."""
    if not isinstance(there, dict) or not isinstance(here, dict):
        return here
    return {key: _shared(value, here.get(key)) for key, value in there.items()}


def run_directory(config: Train) -> Path:
    """<output_dir>/train/<name>/seed<k>: named by what is run, never by the clock."""
    name = Path(str(config.name))
    if name.is_absolute() or ".." in name.parts or not name.parts:
        raise UserError(
            f"name={config.name} must be a name, or a relative path without ..: it lies in output_dir"
        )
    return Path(config.output_dir) / "train" / name / f"seed{config.seed}"


def build_run(config: Train, signals: Signals | None = None, each_step: bool = False) -> TrainingRun:
    """Opens the data, the run's record and the network; nothing is written. Raises UserError for what cannot be.

    each_step: the loss of each step is looked at, and no step is captured.
    """
    device_type = system.device_type_of(config.trainer["accelerator"])
    backend = config.backend.resolve(device_type)
    precision = precision_for(config.trainer, device_type, backend)
    system.set_precision(precision)
    data = image_data(config)
    config.model.num_classes = checked_classes(config.model.num_classes, data)
    keeps = device_type == "cpu" and config.trainer.get("keep_freed_memory", False)
    on_record: dict[str, Any] = {"keeps_freed_memory": keeps and system.keep_freed_memory()}
    directory, same_run = run_directory(config), identity(config, data)
    record = open_record(directory, same_run, fresh=config.overwrite)
    if config.evaluate and not (record.finished or config.probe):
        _ = data.val_store  # opened, not read: what is wrong with it is said before training, not after it
    classifier = Classifier(
        model=plain(config.model),
        augment=plain(config.augment),
        optim=plain(config.optim),
        backend=backend,
        classes=data.classes,
        px=data.px,
        seed=config.seed,
        data=config.data.name,
        resample=data.resample,
        statistics=data.statistics,
        master_weights=precision == MASTER_WEIGHTS,
    )
    notes = backend_notes(config.backend.default, device_type, classifier.speedups)
    goes_on = (directory / CHECKPOINTS / LAST).exists() and not config.overwrite
    if config.init_from and (config.probe or not goes_on):
        origin = on_record["init_from"] = take_weights(classifier.net, config.init_from, data.classes)
        new = ", ".join(origin["new_layers"]) or "no layer"
        notes.append(f"begins with the weights of {origin['path']}; new: {new}; frozen: {config.freeze}")
    notes += small_crops(config.augment.crop_px, data.px)
    classifier.loaded = config.init_from is not None
    for name, parameter in classifier.net.named_parameters():
        if config.freeze == Freeze.features and name.startswith("conv"):
            parameter.requires_grad_(False)  # so the update leaves it alone
    config.backend.check_used(classifier.net.operations | {"cross_entropy"})
    resolved: dict[str, Any] = {
        "backend": backend,
        "precision": precision,
        "float32_matmul_and_conv": "tf32" if precision == TF32 else "ieee",
        "device": device_type,
    }
    if yours := {operation: label(path) for operation, path in backend.items() if is_file(path)}:
        resolved["yours"] = yours
    resolved["speedups"] = asdict(classifier.speedups)
    signals, has_holdout = signals or Signals(), len(data.split[1]) > 0
    trainer = build_trainer(config, has_holdout, same_run, resolved, signals, each_step)
    check_processes(trainer)
    check_batch_size(config.data.batch_size, len(data.split[0]), config.data.drop_last, trainer.world_size)
    made = classifier, data, trainer, record, directory
    return TrainingRun(*made, resolved, on_record, notes, same_run, config.overwrite)


def clear(directory: Path) -> None:
    """Everything but the lock, which somebody may hold. Raises UserError for a directory that holds no run."""
    paths = list(directory.iterdir()) if directory.exists() else []
    there = {path.name for path in paths} - {"lock"}
    if there and not there & {"run.json", "metrics.csv", CHECKPOINTS}:
        raise UserError(
            f"overwrite=true would delete {directory}, which holds no run but {', '.join(sorted(there)[:3])}: "
            "choose another name=... or output_dir=..."
        )
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != "lock":
            path.unlink()


def identity(config: Train, data: ImageData | None) -> dict[str, Any]:
    """What decides whether two runs are the same: the configuration, and the images and split it is about.

    Without `data` (a store that is not on this machine) only the configuration.
    """
    content = plain(config)
    if data is not None:
        manifest = data.train_store.manifest
        arrays = {name: manifest["sha256"][name] for name in ("images.npy", "labels.npy")}
        content["store"] = {**arrays, "holdout": manifest["holdout"]}
    for group, keys in RUNTIME_ONLY.items():
        for key in keys.split():
            (content[group] if group else content).pop(key, None)
    if config.init_from is None:  # runs from before November 2026 do not have these keys
        del content["init_from"], content["freeze"]
    if "precision" in content["trainer"]:
        content["trainer"]["precision"] = full_precision_name(content["trainer"]["precision"])
    for operation, choice in content["backend"].items():
        if choice == Backend.auto:  # what it stands for decides, also against runs that named it
            device_type = system.device_type_of(config.trainer["accelerator"])
            content["backend"][operation] = str(AUTO.get(device_type, Backend.reference))
        elif is_file(choice):  # another version of the file is another run
            content["backend"][operation] = label(choice)
    return content


def backend_notes(default: str, device_type: str, speedups: Speedups) -> list[str]:
    """What a choice of backend means on this device, a line each."""
    on_gpu, notes = device_type == "cuda", []
    reference, fast = (f"{LAUNCHES[backend]:,}" for backend in (Backend.reference, Backend.fast))
    if on_gpu and default == Backend.auto:
        notes.append(
            f"backend=auto took fast on this GPU: every gradient is ours, in {fast} kernel launches a step "
            f"where reference makes {reference} (counted for model=tiny)"
        )
    if on_gpu and default == Backend.reference:
        notes.append(
            f"backend=reference makes {reference} kernel launches a step where fast makes {fast} (counted for "
            "model=tiny): expect it to be several times slower on this GPU. Set backend=fast"
        )
    if any(asdict(speedups).values()):
        notes.append(
            "the first steps compile kernels, for a minute or so; later runs on this machine find them"
        )
        notes.append(f"besides the layers: {speedups}")
    return notes


def small_crops(crop: int, px: int) -> list[str]:
    """A warning where a crop shows little of an image: the paper's 224 of 256 pixels are 77 % of its area."""
    share = (crop / px) ** 2
    if share >= SMALL_CROP:
        return []
    return [
        f"warning: crops of {crop} pixels show {share:.0%} of the area of images of {px}: prepare the data with "
        f"px={round(crop * 8 / 7)}, or choose a model for larger images"
    ]


def image_data(config: Train) -> ImageData:
    """The data module; the synthetic set is made where it is missing."""
    root = Path(config.data.root)
    if config.data.name == "synthetic" and not (root / "val" / "manifest.json").exists():
        prepare(PrepareConfig(name="synthetic", root=str(root)))
    if config.evaluate and (root / "train").exists() and not (root / "val" / "manifest.json").exists():
        raise UserError(
            f"evaluate=true, but {root} has no val store: set evaluate=false, or prepare it with val_fraction=0.1"
        )
    data = ImageData(config.data, config.augment, config.seed)
    data.setup("fit")
    if config.optim.schedule == Schedule.plateau and not len(data.split[1]):
        raise UserError(
            f"optim.schedule=plateau, but {root} holds no holdout images (one image per class leaves none): "
            "set optim.schedule=steps, or prepare more images per class"
        )
    return data


def checked_classes(asked: int | None, data: ImageData) -> int:
    there = len(data.classes)
    if asked not in (None, there):
        raise UserError(
            f"model.num_classes={asked}, but {data.config.root} holds {there} classes: leave model.num_classes out"
        )
    return there


def build_trainer(
    config: Train,
    has_holdout: bool,
    same_run: dict[str, Any],
    resolved: dict[str, Any],
    signals: Signals,
    each_step: bool,
) -> pl.Trainer:
    """The trainer of conf/trainer/*.yaml, the loggers of conf/logger, our callbacks and conf/callbacks.

    Enters into `resolved` whether the step is captured.
    """
    directory = run_directory(config)
    checkpoints, metrics = directory / CHECKPOINTS, MetricsFile(directory / "metrics.csv", config.log_every)
    shown, terminal = bool(config.trainer["enable_progress_bar"]), sys.stdout.isatty()
    progress = [ours.Progress(refresh_rate=10) if terminal else ours.Lines(metrics)] if shown else []
    callbacks: list[Callback] = [
        metrics,
        ours.Watchdog(config.watchdog, config.watchdog_steps, config.checkpoint_every, each_step),
        *progress,
        *([ours.AveragedWeights(decay=config.optim.ema_decay)] if config.optim.ema_decay else []),
        *([ours.FirstKernels()] if config.logger and find_spec("matplotlib") else []),
        *(instantiate(callback) for callback in config.callbacks.values()),
        *([ours.BestCheckpoint(checkpoints)] if has_holdout else []),
        ours.LastCheckpoint(checkpoints, config.checkpoint_every, same_run, signals, config.log_every),
    ]
    arguments = {k: v for k, v in config.trainer.items() if k not in ("capture", "keep_freed_memory")}
    if not has_holdout:
        arguments["limit_val_batches"] = 0
    resolved["captured"] = not each_step and captures(config.trainer, resolved, callbacks)
    if resolved["captured"]:
        arguments["strategy"] = CapturedStrategy()
    plugins: list[Any] = [ours.AtomicCheckpointIO()]
    if SLURMEnvironment.detect():
        plugins.append(SLURMEnvironment(auto_requeue=False))  # its checkpoint is one that nobody reads
    # Lightning sees only the type that weights and activations are stored in.
    precision = resolved["precision"] if resolved["precision"] in system.LIGHTNING else "32-true"
    arguments |= {"precision": precision, "enable_progress_bar": shown and terminal}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*GPU available but not used.*")
        return instantiate(
            arguments,
            callbacks=callbacks,
            default_root_dir=str(directory),
            logger=[instantiate(logger) for logger in config.logger.values()] or False,
            plugins=plugins,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            _convert_="all",
        )


def check_processes(trainer: pl.Trainer) -> None:
    """Raises UserError unless as many processes are started as the run would wait for, half an hour long."""
    asked = f"trainer.num_nodes={trainer.num_nodes} and trainer.devices={trainer.num_devices}"
    if TorchElasticEnvironment.detect():
        started, wanted = int(os.environ["WORLD_SIZE"]), trainer.num_nodes * trainer.num_devices
        if started != wanted:
            raise UserError(
                f"torchrun starts {started} processes, but {asked} are {wanted}: give --nnodes and "
                "--nproc_per_node the same numbers"
            )
    elif trainer.num_nodes > 1 and not SLURMEnvironment.detect() and "NODE_RANK" not in os.environ:
        raise UserError(
            f"{asked}: start it on every node, with torchrun --nnodes={trainer.num_nodes} or with srun"
        )


def captures(trainer: dict[str, Any], resolved: dict[str, Any], callbacks: list[Callback]) -> bool:
    """Whether the step of this run is one CUDA graph: trainer.capture=auto wherever it can be."""
    capture = trainer.get("capture", "auto")
    asked = str(capture).lower()
    if asked not in ("auto", "true", "false"):
        raise UserError(f"trainer.capture={capture} must be one of auto, true, false")
    if asked == "false":
        return False
    reason = obstacle(trainer, resolved, callbacks)
    if reason and asked == "true":
        raise UserError(f"trainer.capture={capture}: {reason}. Set trainer.capture=auto")
    return not reason


def is_rank_zero() -> bool:
    """Whether this process is the first of a run: the one that writes and prints."""
    return int(getattr(rank_zero_only, "rank", None) or 0) == 0


def precision_for(trainer: dict[str, Any], device_type: str, backend: dict[str, str]) -> str:
    """`auto` is bfloat16 where the hardware multiplies it natively, else float32.

    bfloat16 means float32 master weights with bfloat16 working copies (master_weights.py), or autocast where these do
    not serve: without a compiled backend, and on several devices, which exchange the gradients of the master weights.
    """
    asked = system.checked_precision(str(trainer["precision"]), device_type)
    single = single_device(trainer)
    if asked == MASTER_WEIGHTS and not single:
        raise UserError(
            f"trainer.precision={MASTER_WEIGHTS} is for one device: set trainer.precision=bf16-mixed"
        )
    if asked != "auto":
        return asked
    if not system.has_native_bf16(device_type):
        return "32-true"
    return MASTER_WEIGHTS if single and "compiled" in backend.values() else "bf16-mixed"
