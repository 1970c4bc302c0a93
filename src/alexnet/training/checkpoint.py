"""Checkpoints: tensors and plain data, never executed; and weights of torchvision's network for `owt`.

A checkpoint carries what evaluation needs beside the weights: the configuration of the network, the mean image, the
crop rule and the class names. It is opened with `weights_only=True`, which refuses anything that would run code.
"""

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alexnet.errors import UserError
from alexnet.training.classifier import Classifier

# Layers of ours under torchvision's names (torchvision.models.alexnet): the "one weird trick" network.
TORCHVISION_LAYERS = {
    "features.0": "conv1",
    "features.3": "conv2",
    "features.6": "conv3",
    "features.8": "conv4",
    "features.10": "conv5",
    "classifier.1": "fc6",
    "classifier.4": "fc7",
    "classifier.6": "fc8",
}
# What torch.load makes of a file that is no checkpoint.
UNREADABLE = (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, AssertionError, KeyError)


def read(path: str | Path) -> dict[str, Any]:
    """A checkpoint as plain data. Raises UserError if it is missing, or no checkpoint, or would execute code."""
    path = find(path)
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
    if not isinstance(content, dict) or "hyper_parameters" not in content:
        raise UserError(f"checkpoint={path} is no checkpoint of scripts/train.py: it has no hyper_parameters")
    missing = sorted({"model", "augment", "optim", "classes"} - set(content["hyper_parameters"]))
    if missing:
        raise UserError(
            f"checkpoint={path} is no checkpoint of scripts/train.py: its hyper_parameters lack {', '.join(missing)}"
        )
    return content


def find(path: str | Path) -> Path:
    """A checkpoint file, or the best one of a run directory."""
    path = Path(path)
    candidates = [
        path,
        path / "checkpoints" / "best.ckpt",
        path / "checkpoints" / "last.ckpt",
        path / "best.ckpt",
    ]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    if path.is_dir():
        raise UserError(
            f"checkpoint={path} holds no checkpoints/best.ckpt: give the directory of a run, seed<k>"
        )
    raise UserError(f"checkpoint={path} does not exist. Train one: python scripts/train.py")


def load(path: str | Path, backend: Mapping[str, str] | None = None) -> Classifier:
    """The trained Classifier, in evaluation mode, under any backend (default: the one it was trained with)."""
    content = read(path)
    arguments = dict(content["hyper_parameters"])
    if backend is not None:
        arguments["backend"] = dict(backend)
    classifier = Classifier(**arguments)
    try:
        classifier.load_state_dict(content["state_dict"])
    except (RuntimeError, KeyError) as error:
        raise UserError(
            f"checkpoint={path} does not hold the weights of its own network: it is damaged, or of another version"
        ) from error
    return classifier.eval()


def from_torchvision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's alexnet state dict under our names, for AlexNet with the `owt` preset."""
    return {_rename(name): value for name, value in state.items()}


def _rename(name: str) -> str:
    layer, _, parameter = name.rpartition(".")
    if layer not in TORCHVISION_LAYERS:
        raise UserError(f"{name!r} is no parameter of torchvision's alexnet")
    return f"{TORCHVISION_LAYERS[layer]}.{parameter}"
