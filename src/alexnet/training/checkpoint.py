"""Checkpoints: tensors and plain data, never executed; and weights of torchvision's network for `owt`.

A checkpoint carries what evaluation needs beside the weights: the configuration of the network, the mean image, the
crop rule and the class names. It is opened with `weights_only=True`, which refuses anything that would run code.
"""

import json
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alexnet.cli import compose_group, plain
from alexnet.data.augment import AugmentConfig, InputScale
from alexnet.errors import UserError
from alexnet.layers import Backends
from alexnet.model import ModelConfig
from alexnet.optim import OptimConfig
from alexnet.training.network import Network
from alexnet.training.record import read_record, refuse_other

# Ours under the names of torchvision.models.alexnet, the "one weird trick" network: conv1 is features.0, ...
LAYERS = {f"features.{i}": f"conv{number}" for number, i in zip(range(1, 6), (0, 3, 6, 8, 10), strict=True)}
LAYERS |= {f"classifier.{i}": f"fc{number}" for number, i in zip(range(6, 9), (1, 4, 6), strict=True)}
TORCHVISION = {
    f"{theirs}.{kind}": f"{ours}.{kind}" for theirs, ours in LAYERS.items() for kind in ("weight", "bias")
}
TORCHVISION_SCALING = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # mean and std of 0..1 pixels
WEIGHTS, CONFIG = "model.safetensors", "config.json"  # the files of an exported network (export.py)
FOR_OTHERS = (".onnx", ".pt2")  # exports that this program cannot read back
# What torch.load makes of a file that is no checkpoint.
UNREADABLE = (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, AssertionError, KeyError)

CHECKPOINTS = "checkpoints"  # their folder in a run's directory
LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"
OF_A_NETWORK = ("state_dict", "hyper_parameters", "identity", "epoch", "global_step")  # what best.ckpt holds


def resume_point(directory: Path) -> tuple[Path | None, dict[str, Any], str]:
    """The newest checkpoint that is whole, its content, and a warning where it is not the last one.

    None where there is no checkpoint. Raises UserError if every one is damaged, or holds weights alone.
    """
    warning = ""
    there = [path for name in (LAST, PREVIOUS) if (path := directory / CHECKPOINTS / name).exists()]
    for path in there:
        try:
            content = read(path)
            if "optimizer_states" not in content:
                raise UserError(
                    f"{path} holds weights alone, as best.ckpt does, and no run goes on from them: give them to a new "
                    f"run, init_from={path} name=..., or begin this one anew, overwrite=true"
                )
            return path, content, warning
        except UserError as error:
            if path == there[-1]:
                raise
            warning = f"warning: {error}. Going on from {there[-1].name}, which was saved before it"
    return None, {}, warning


def read(path: str | Path) -> dict[str, Any]:
    """A checkpoint as plain data. Raises UserError if it is missing, damaged, no checkpoint, or would execute code."""
    path = find(path)
    if path.suffix == ".safetensors":
        return _read_export(path)
    if damage := _damage(path):
        raise UserError(f"checkpoint={path} is damaged: {damage}")
    try:
        with warnings.catch_warnings():  # what torch thinks of a file that is none of ours is said below
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        if "unsupported global" in str(error).lower():  # torch's words for an object it would have to call
            raise UserError(
                f"checkpoint={path} is refused: it holds more than tensors and plain data, and loading it would run "
                "code. Use a checkpoint written by scripts/train.py"
            ) from error
        raise UserError(
            f"checkpoint={path} cannot be read ({type(error).__name__}): it is damaged or no checkpoint"
        ) from error
    if isinstance(content, dict) and set(content) == set(TORCHVISION):
        return _of_torchvision(content)
    if not isinstance(content, dict) or not isinstance(content.get("hyper_parameters"), dict):
        raise UserError(f"checkpoint={path} was not written by scripts/train.py: it has no hyper_parameters")
    missing = sorted({"model", "augment", "optim", "classes"} - set(content["hyper_parameters"]))
    if missing:
        raise UserError(
            f"checkpoint={path} was not written by scripts/train.py: its hyper_parameters lack {', '.join(missing)}"
        )
    return content


def _read_export(path: Path) -> dict[str, Any]:
    """<folder>/model.safetensors with its config.json, as a checkpoint's content."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = json.loads((path.parent / CONFIG).read_text(encoding="utf-8"))
        return {"hyper_parameters": config["hyper_parameters"], "state_dict": load_file(path)}
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UserError(
            f"checkpoint={path} cannot be read ({type(error).__name__}): it or its {CONFIG} is damaged or missing"
        ) from error


def _of_torchvision(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """torchvision's own state dict as the content of a checkpoint of `owt`, with torchvision's classes and scaling.

    Its classes have no wnids; they are in the order of ImageNet's sorted wnids.
    """
    from torchvision.models import AlexNet_Weights

    names = AlexNet_Weights.IMAGENET1K_V1.meta["categories"]
    n = len(state["classifier.6.bias"])
    classes = [{"wnid": "", "words": names[i] if n == len(names) else str(i)} for i in range(n)]
    hyper_parameters = {
        "model": plain(compose_group("model", "owt", ModelConfig, {"num_classes": n})),
        "augment": plain(AugmentConfig(crop_px=224, input=InputScale.normalised)),
        "optim": plain(OptimConfig()),
        "backend": Backends().resolve("cpu"),
        "classes": classes,
        "px": 256,
        "seed": 0,
        "data": "imagenet",
        "resample": "bilinear",
    }
    weights = {f"net.{name}": value for name, value in from_torchvision(state).items()}
    mean, std = (255 * torch.tensor(values) for values in TORCHVISION_SCALING)
    views = {"mean": mean, "std": std, "eigenvalues": torch.zeros(3), "eigenvectors": torch.eye(3)}
    state_dict = weights | {f"augment.{name}": value for name, value in views.items()}
    return {"hyper_parameters": hyper_parameters, "state_dict": state_dict}


def _damage(path: Path) -> str:
    """What contradicts the checksums that torch keeps of all it writes; empty if nothing does, or there are none.

    torch.load does not look at them: one wrong bit would be another weight.
    """
    if not zipfile.is_zipfile(path):
        return ""  # torch.load says what it is
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except Exception as error:  # whatever a wrong bit in its directory leads to
        return f"its directory cannot be read ({type(error).__name__})"
    return f"{broken} does not fit its checksum" if broken else ""


def find(path: str | Path) -> Path:
    """A checkpoint file, the best one of a run directory, or the weights of an exported network."""
    path = Path(path)
    if (path / "run.json").is_file() and not (path / read_record(path).get("checkpoint", "")).exists():
        raise UserError(
            f"checkpoint={path} lacks the file that its run.json names: restore it, or give "
            f"{path / CHECKPOINTS / LAST} for the last epoch"
        )
    candidates = [path, path / CHECKPOINTS / BEST, path / CHECKPOINTS / LAST, path / BEST, path / WEIGHTS]
    for candidate in candidates:
        if candidate.is_file() and candidate.suffix not in FOR_OTHERS:
            return candidate
    for file in (path, path / "model.onnx", path / "model.pt2"):
        if file.is_file():
            raise UserError(
                f"checkpoint={file} is an export for other programs: give its run, or export format=safetensors"
            )
    if path.is_dir():
        raise UserError(
            f"checkpoint={path} holds no checkpoints/best.ckpt: give the directory of a run, seed<k>"
        )
    raise UserError(f"checkpoint={path} does not exist. Train one: python scripts/train.py")


def load(path: str | Path, backend: Mapping[str, str] | None = None) -> Network:
    """The trained network, in evaluation mode, under any backend (default: the one it was trained with)."""
    content, file = read(path), find(path)
    directory = file.parent.parent
    if "identity" in content and file.parent.name == CHECKPOINTS and (directory / "run.json").exists():
        # It was copied into the directory of another run.
        refuse_other(f"{file} is of a run", content["identity"], read_record(directory)["config"])
    arguments = dict(content["hyper_parameters"])
    if unknown := sorted(set(arguments) - set(signature(Network).parameters)):
        raise UserError(
            f"checkpoint={path} is refused: its hyper_parameters hold {', '.join(unknown)}, which scripts/train.py of "
            "this version does not write"
        )
    if backend is not None:
        arguments["backend"] = dict(backend)
    network = Network(**arguments)
    try:
        network.load_state_dict(content["state_dict"])
    except (RuntimeError, KeyError) as error:
        raise UserError(
            f"checkpoint={path} does not hold the weights of its own network: it is damaged, or of another version"
        ) from error
    return network.eval()


def from_torchvision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's alexnet state dict under our names, for AlexNet with the `owt` preset."""
    if unknown := [name for name in state if name not in TORCHVISION]:
        raise UserError(f"{unknown[0]!r} must be a parameter of torchvision's alexnet")
    return {TORCHVISION[name]: value for name, value in state.items()}
