"""Exported networks compute the checkpoint's logits, and are read without this package where the format allows."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models import AlexNet_Weights, alexnet

from alexnet import export as module
from alexnet.errors import UserError
from alexnet.export import Export, Format, export
from alexnet.training.checkpoint import load

OTHERS_READ_IT = {
    Format.torch_export: "import torch; y = torch.export.load('{}/model.pt2').module()(torch.load('x.pt'))",
    Format.onnx: "import onnxruntime, torch; s = onnxruntime.InferenceSession('{}/model.onnx'); "
    "y = torch.from_numpy(s.run(None, {{'images': torch.load('x.pt').numpy()}})[0])",
}


def crops(n: int = 5) -> Tensor:
    return torch.randint(256, (n, 56, 56, 3), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def logits(path: Path, images: Tensor) -> Tensor:
    """Of stored images whose centre crop the images are."""
    classifier = load(path)
    stored = torch.zeros(len(images), 64, 64, 3, dtype=torch.uint8)
    stored[:, 4:60, 4:60] = images
    with torch.inference_mode():
        return classifier(classifier.augment.centre(stored))


def test_safetensors_load_as_a_checkpoint_with_equal_bits(checkpoint: Path, tmp_path: Path) -> None:
    directory = export(Export(str(checkpoint), into=str(tmp_path / "net")))
    assert torch.equal(logits(directory, crops()), logits(checkpoint, crops()))
    assert load(directory / "model.safetensors").classes == load(checkpoint).classes
    config = json.loads((directory / "config.json").read_text())
    assert list(config["id2label"].values()) == [c["words"] or c["wnid"] for c in load(checkpoint).classes]
    assert "centre crop of 56 pixels" in (directory / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("form", list(OTHERS_READ_IT))
def test_a_graph_is_read_without_this_package(form: Format, checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime") if form == Format.onnx else None
    directory = export(Export(str(checkpoint), form, into=str(tmp_path / "net")))
    torch.save(crops().permute(0, 3, 1, 2).float().contiguous(), tmp_path / "x.pt")
    program = OTHERS_READ_IT[form].format(directory)
    check = "import sys; assert not any(m.startswith('alexnet') for m in sys.modules); torch.save(y, 'y.pt')"
    subprocess.run([sys.executable, "-c", f"{program}; {check}"], cwd=tmp_path, check=True)
    expected = logits(checkpoint, crops())
    off = (torch.load(tmp_path / "y.pt") - expected).abs().max() / expected.abs().max()
    assert off <= module.TOLERANCE


def test_what_computes_other_logits_is_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = module.as_safetensors
    monkeypatch.setattr(module, "as_safetensors", lambda *arguments: right(*arguments) * 1.001)
    with pytest.raises(UserError, match="logits differ by"):
        export(Export(str(checkpoint), into=str(tmp_path / "net")))


def test_a_folder_that_is_there_is_not_overwritten(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists: remove it, or set into="):
        export(Export(str(checkpoint), into=str(tmp_path)))


@pytest.mark.parametrize("damage", ["config.json", "model.safetensors"])
def test_a_damaged_export_is_one_line(damage: str, checkpoint: Path, tmp_path: Path) -> None:
    directory = export(Export(str(checkpoint), into=str(tmp_path / "net")))
    (directory / damage).write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        load(directory)


def test_the_file_of_torchvision_is_a_checkpoint(tmp_path: Path) -> None:
    """Its own preprocessing and network give the logits that ours give."""
    torch.manual_seed(0)
    net = alexnet().eval()
    torch.save(net.state_dict(), tmp_path / "alexnet.pth")
    classifier = load(tmp_path / "alexnet.pth")
    image = torch.randint(256, (1, 256, 256, 3), dtype=torch.uint8)
    preprocess: Any = AlexNet_Weights.IMAGENET1K_V1.transforms()
    with torch.inference_mode():
        expected = net(preprocess(image.permute(0, 3, 1, 2)))
        ours = classifier(classifier.augment.centre(image))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert classifier.classes[0]["words"] == "tench"
