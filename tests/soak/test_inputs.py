"""Mutated pictures and generated command lines: taken or refused in one line, never a crash, never a hang."""

import json
import os
import random
import shutil
import sys
import urllib.request
import warnings
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NoReturn
from urllib.error import URLError

import numpy as np
import pytest
from tests.data.test_sources import encoded, picture
from tests.soak.process import HUNG, Child, number, script, tally
from tests.test_overrides import sets, small, stopped_before_writing, tried  # noqa: F401

from alexnet.data.pictures import Resample, decode, fit

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3 * 3600), pytest.mark.filterwarnings("ignore")]
SLOW = 60  # seconds after which a command hangs
PX = 16


# Pictures -------------------------------------------------------------------------------------------------


def originals() -> Iterator[bytes]:
    """One of each format, mode and kind of EXIF that a camera or a program writes."""
    image = picture(1, (48, 36))
    exif = image.getexif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    for options in ({}, {"progressive": True}, {"exif": exif}, {"subsampling": 2}):
        yield encoded(image, "JPEG", **options)
    yield encoded(image.convert("CMYK"), "JPEG")
    for mode in ("1", "L", "P", "LA", "RGBA", "I;16"):
        yield encoded(image.convert("L").convert(mode) if mode == "I;16" else image.convert(mode), "PNG")
    yield encoded(image.convert("L"), "PNG", transparency=7)
    yield encoded(image.convert("P"), "GIF", save_all=True, append_images=[picture(2, (48, 36)).convert("P")])
    yield encoded(image, "BMP")
    for compression in (None, "tiff_lzw", "tiff_deflate", "jpeg", "packbits"):
        yield encoded(image, "TIFF", compression=compression)
    yield encoded(image, "WEBP")
    yield encoded(image.convert("RGBA"), "WEBP", lossless=True, exif=exif)
    yield encoded(image, "PPM")


def mutated(data: bytes, draw: random.Random) -> bytes:
    """Some bits flipped, a field at its extreme, cut, a piece doubled, taken out, or from elsewhere in the file."""
    changed = bytearray(data)
    for _ in range(draw.choice([1, 1, 1, 2, 8])):
        # Headers are short, and most of what can go wrong stands in them.
        at = draw.randrange(min(len(changed), draw.choice([40, 400, len(changed)])) or 1)
        size = draw.choice([1, 2, 4, 16])
        kind = draw.choice(["bit", "bit", "extreme", "cut", "double", "remove", "move"])
        if kind == "bit" and changed:
            changed[at] ^= 1 << draw.randrange(8)
        elif kind == "extreme":
            changed[at : at + size] = draw.choice([b"\0", b"\xff", b"\x7f", b"\x80"]) * size
        elif kind == "cut":
            del changed[max(at, len(changed) // 3) :]
        elif kind == "double":
            changed[at:at] = changed[at : at + size]
        elif kind == "remove":
            del changed[at : at + size]
        else:
            other = draw.randrange(len(changed) or 1)
            changed[at : at + size] = changed[other : other + size]
    return bytes(changed)


def pixels(data: bytes) -> np.ndarray | None:
    """What a store should hold of it; None for a bad file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return np.asarray(fit(decode(data, min_side=8), PX, Resample.area))
        except Exception:
            return None


def test_mutated_pictures_are_taken_or_named(tmp_path: Path) -> None:
    """Every one is decoded twice, alone in a child of its own and by prepare_data: both say the same."""
    draw, n = random.Random(int(number("SEED", 0))), int(number("PICTURES", 1000))
    wholes = list(originals())
    folder = tmp_path / "set"
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        (folder / name / "whole.png").write_bytes(encoded(picture(7), "PNG"))
    with tally("pictures") as counted:
        expected: dict[str, np.ndarray | None] = {}
        for k in range(n):
            data = mutated(wholes[k % len(wholes)], draw)
            file = folder / ("cat", "dog")[k % 2] / f"{k}.jpg"  # a content that is no picture has its ending
            file.write_bytes(data)
            result = tmp_path / "pixels.npy"
            result.unlink(missing_ok=True)

            def alone(data: bytes = data, result: Path = result) -> None:
                found = pixels(data)
                if found is not None:
                    np.save(result, found)

            ended = Child(alone, tmp_path / "log").wait(SLOW)
            if ended.code:
                file.unlink()
                counted.add(
                    "hung" if ended.code == HUNG else "crashed", f"picture {k}: {ended.code} {ended.err}"
                )
                continue
            expected[f"{file.parent.name}/{file.name}"] = np.load(result) if result.exists() else None
        arguments = ["data=folder", f"path={folder}", "name=soak", f"px={PX}", "on_corrupt=skip", "workers=2",
                     "holdout_fraction=0", f"data_dir={tmp_path / 'data'}"]  # fmt: skip
        ended = Child(script("prepare_data", *arguments), tmp_path / "log").wait(600)
        assert not ended.code, ended.err
        manifest = json.loads((tmp_path / "data/soak/train/manifest.json").read_text())
        bad = set(manifest["corrupt"])
        images = iter(np.load(tmp_path / "data/soak/train/images.npy"))
        order = sorted([*expected, "cat/whole.png", "dog/whole.png"])
        stored = {name: next(images) for name in order if name not in bad}
        assert next(images, None) is None, "a row that belongs to no file"
        for name, found in expected.items():
            if found is None:
                counted.add(
                    *(["refused"] if name in bad else ["lost", f"{name} is no picture but was stored"])
                )
            else:
                same = name in stored and np.array_equal(stored[name], found)
                counted.add(
                    *(["recovered"] if same else ["lost", f"{name} was decoded otherwise, or left out"])
                )


# Command lines --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("stopped_before_writing")
def test_generated_overrides(
    data_dir: Path,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each set in a child of its own, so that a crash ends it alone."""
    captured = sys.stdout, sys.stderr
    with tally("overrides") as counted:
        scripts: Counter[str] = Counter()
        for drawn in sets(int(number("OVERRIDES", 1000)), int(number("SEED", 0)) + 1):
            place = tmp_path / "place"
            place.mkdir(exist_ok=True)
            result = tmp_path / "result.json"
            result.unlink(missing_ok=True)

            def body(
                drawn: tuple[str, list[str]] = drawn, place: Path = place, result: Path = result
            ) -> None:
                sys.stdout, sys.stderr = captured  # what `capsys` reads
                found = tried([drawn], data_dir, checkpoint, place, monkeypatch, capsys)
                result.write_text(json.dumps(found))

            ended = Child(body, tmp_path / "log").wait(SLOW)
            line = f"{drawn[0]} {' '.join(drawn[1])}"
            scripts[drawn[0]] += 1
            if ended.code or not result.exists():
                counted.add(
                    "hung" if ended.code == HUNG else "crashed", f"{line}: {ended.code} {ended.err[-500:]}"
                )
                continue
            counts, broken = json.loads(result.read_text())
            outcome = "crashed" if broken else "refused" if counts.get("refused") else "recovered"
            counted.add(outcome, "; ".join(broken))
        counted.more["scripts"] = scripts


ELSEWHERE = ("/nowhere", "/dev/", "/proc/")  # places that are not this test's
LIMIT = 20  # seconds after which a command runs


def unreachable(*_: object, **__: object) -> NoReturn:
    raise URLError("no network")


def test_what_starts_also_ends_as_promised(data_dir: Path, checkpoint: Path, tmp_path: Path) -> None:
    """Generated command lines, not only up to their first write: settings that fail late."""
    quick = ("train", "train", "evaluate", "predict", "export", "prepare_data")
    drawn = (d for d in sets(10**6, int(number("SEED", 0)) + 2) if d[0] in quick)
    drawn = (d for d in drawn if not any(word in o for o in d[1] for word in ELSEWHERE))
    with tally("overrides_to_the_end") as counted:
        for name, overrides in islice(drawn, int(number("TO_THE_END", 300))):
            place = tmp_path / "place"
            shutil.rmtree(place, ignore_errors=True)
            (place / "cwd").mkdir(parents=True)
            stores = place / "data" if name == "prepare_data" else data_dir
            arguments = small(name, overrides, stores, checkpoint, place)

            def body(name: str = name, arguments: list[str] = arguments, place: Path = place) -> None:
                os.chdir(place / "cwd")
                os.environ["HOME"] = str(place / "cwd")
                urllib.request.urlopen = unreachable
                script(name, *arguments)()

            ended = Child(body, tmp_path / "log").wait(LIMIT)
            left = [str(path.relative_to(place)) for path in place.rglob("*") if path.name != "cwd"]
            line = f"{name} {' '.join(overrides)}"
            if ended.refused:
                counted.add("refused", f"{line}: left {left} after {ended.err}" if left else "")
            elif ended.code in (0, HUNG) or (ended.code == 1 and name == "predict"):
                counted.add("recovered")
            else:
                counted.add("crashed", f"{line}: {ended.code} {ended.err[-600:]}")
