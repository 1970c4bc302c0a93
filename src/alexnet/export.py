"""The verb `export`: a trained network in a form that others read, checked against the original before it is kept.

    safetensors    weights and config.json, with a model card: the files of a model on the Hugging Face Hub;
                   `checkpoint=` takes the folder
    torch_export   a graph that torch.export.load reads, without this package
    onnx           a graph for onnxruntime and others

The graphs take crops as they are decoded, RGB in 0..255, float32 (N, 3, crop, crop), subtract the mean themselves and
return logits (N, classes). config.json says how a crop is cut and what the classes are.
"""

import shutil
import warnings
from dataclasses import dataclass, fields
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alexnet.data.augment import InputScale
from alexnet.errors import UserError
from alexnet.layers import Backends
from alexnet.system import command_line, read_json, write_json
from alexnet.training.checkpoint import CONFIG, WEIGHTS, find, load
from alexnet.training.network import Network

OPSET = 18  # of ONNX, 2022
TOLERANCE = 1e-5  # largest difference of a logit, relative to the largest logit


class Format(StrEnum):
    safetensors = "safetensors"
    torch_export = "torch_export"
    onnx = "onnx"


@dataclass
class Export:
    """scripts/export.py."""

    checkpoint: str | None = None  # a checkpoint file or a run directory
    format: Format = Format.safetensors
    # A new folder; None: <output_dir>/export/<run>-seed<k>-<format>, or <file>-<format>.
    into: str | None = None
    output_dir: str = "outputs"

    def __post_init__(self) -> None:
        if not self.checkpoint:
            raise UserError("checkpoint is not given: use checkpoint=<file or run directory>")


class Portable(nn.Module):
    """The network with the subtraction of the mean before it, of torch's own operators."""

    mean: Tensor
    std: Tensor

    def __init__(self, classifier: Network) -> None:
        super().__init__()
        augment = classifier.augment
        mean = augment.mean if augment.mean.dim() == 3 else augment.mean.view(1, 1, 3)
        scaled = augment.config.input == InputScale.normalised
        self.register_buffer("mean", mean.permute(2, 0, 1).contiguous())
        self.register_buffer("std", (augment.std if scaled else torch.ones(3)).view(3, 1, 1))
        self.net = classifier.net

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, crop, crop) in 0..255 -> logits (N, classes)."""
        return self.net((images - self.mean) / self.std)


def export(config: Export) -> Path:
    """Writes the folder and returns it. Raises UserError if it is there, if a tool is missing, or if what was written
    computes other logits than the checkpoint."""
    source = find(str(config.checkpoint))
    native = {field.name: "native" for field in fields(Backends) if field.name != "default"}
    classifier = load(source, native)
    run = source.parent.parent
    name = f"{run.parent.name}-{run.name}" if (run / "run.json").exists() else source.stem
    directory = Path(config.into or Path(config.output_dir) / "export" / f"{name}-{config.format}")
    if directory.exists():
        raise UserError(f"into={directory} exists: remove it, or set into=<another folder>")
    crop = classifier.augment.config.crop_px
    example = torch.randint(256, (2, 3, crop, crop), generator=torch.Generator().manual_seed(0)).float()
    with torch.inference_mode():
        expected = Portable(classifier)(example)
    write = {Format.safetensors: as_safetensors, Format.torch_export: as_program, Format.onnx: as_onnx}
    directory.mkdir(parents=True)
    try:
        again = write[config.format](classifier, example, directory)
        difference = float((again - expected).abs().max() / expected.abs().max())
        if not difference <= TOLERANCE:
            raise UserError(
                f"{directory}: logits differ by {difference:.1e} of the largest, {TOLERANCE:g} is allowed"
            )
        describe(classifier, source, config, directory)
    except BaseException:  # half a folder would be refused the next time
        shutil.rmtree(directory)
        raise
    print(f"{config.format}: logits agree to {difference:.0e} of the largest\n{directory}")
    return directory


def as_safetensors(classifier: Network, example: Tensor, directory: Path) -> Tensor:
    save_file = tool("safetensors.torch", "safetensors").save_file
    hyper_parameters = {**classifier.arguments, "backend": Backends().resolve("cpu")}
    save_file({k: v.contiguous() for k, v in classifier.state_dict().items()}, directory / WEIGHTS)
    write_json(directory / CONFIG, {"model_type": "alexnet", "hyper_parameters": hyper_parameters})
    with torch.inference_mode():
        return Portable(load(directory))(example)


def as_program(classifier: Network, example: Tensor, directory: Path) -> Tensor:
    program = traced(classifier, example)
    torch.export.save(program, directory / "model.pt2")
    with torch.inference_mode():
        return torch.export.load(directory / "model.pt2").module()(example)


def as_onnx(classifier: Network, example: Tensor, directory: Path) -> Tensor:
    runtime = tool("onnxruntime", "onnx")
    tool("onnxscript", "onnx")
    path = str(directory / "model.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            traced(classifier, example),
            (),
            path,
            input_names=["images"],
            output_names=["logits"],
            opset_version=OPSET,
            external_data=False,
            verbose=False,
        )
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": example.numpy()})[0])


def traced(classifier: Network, example: Tensor) -> torch.export.ExportedProgram:
    """The graph for any number of images."""
    batch = torch.export.Dim("N", min=1, max=4096)
    return torch.export.export(Portable(classifier).eval(), (example,), dynamic_shapes=({0: batch},))


def tool(module: str, extra: str) -> Any:
    """An optional package. Raises UserError with the command that installs it."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(f"{module} is missing: python -m pip install -e '.[{extra}]'") from error


def describe(classifier: Network, source: Path, config: Export, directory: Path) -> None:
    """config.json and the model card README.md."""
    path = directory / CONFIG
    known = read_json(path) if path.exists() else {"model_type": "alexnet"}
    px, crop = classifier.arguments["px"], classifier.augment.config.crop_px
    steps = f"short side to {px} pixels, centre square, centre crop of {crop} pixels, RGB in 0..255"
    classes = {str(i): c["words"] or c["wnid"] for i, c in enumerate(classifier.classes)}
    known |= {"preprocessing": steps, "input": [3, crop, crop], "id2label": classes}
    known |= {"opset": OPSET} if config.format == Format.onnx else {}
    write_json(path, known)
    run = source.parent.parent / "run.json"
    record = read_json(run) if run.exists() else {}
    data = record.get("config", {}).get("data", {}).get("name", "not recorded")
    lines = [
        "---\nlibrary_name: pytorch\npipeline_tag: image-classification\ntags: [alexnet]\n---\n",
        "# AlexNet (Krizhevsky, Sutskever and Hinton, 2012)\n",
        f"Input: {steps}. {len(classes)} classes.\n",
        f"Data set: {data}. Trained by `{record.get('command', 'not recorded')}`.\n",
    ]
    for split, result in record.get("results", {}).items():
        error = f"top-1 error {100 * result['top1_error']:.2f} %"
        lines.append(f"- {split}, {result['n']:,} images, {result['views']} view(s): {error}")
    (directory / "README.md").write_text("\n".join([*lines, f"\nExported by `{command_line()}`.", ""]))
