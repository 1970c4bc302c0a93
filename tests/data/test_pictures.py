"""Every kind of picture becomes the square decided, within the memory stated; whatever else is a bad file."""

import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin
from test_sources import encoded, picture

from alexnet.data import pictures
from alexnet.data.pictures import Resample, Slice, Unreadable, decode, fit, is_picture, read, reason, to_rgb

KERNELS = {Resample.bilinear: Image.Resampling.BILINEAR, Resample.bicubic: Image.Resampling.BICUBIC,
           Resample.lanczos: Image.Resampling.LANCZOS}  # fmt: skip


def centre(data: bytes) -> list[int]:
    image = decode(data)
    assert image.mode == "RGB"
    return list(image.getpixel((image.width // 2, image.height // 2)))


FLAT: dict[str, tuple[Callable[[], bytes], list[int]]] = {
    "rgb": (lambda: encoded(Image.new("RGB", (9, 9), (200, 30, 90)), "PNG"), [200, 30, 90]),
    "grayscale": (lambda: encoded(Image.new("L", (9, 9), 77), "PNG"), [77] * 3),
    "bilevel": (lambda: encoded(Image.new("1", (9, 9), 1), "PNG"), [255] * 3),
    "16-bit": (lambda: encoded(Image.fromarray(np.full((9, 9), 77 * 257 + 3, np.uint16)), "PNG"), [77] * 3),
    "32-bit": (lambda: encoded(Image.fromarray(np.full((9, 9), 30_000, np.int32)), "TIFF"), [117] * 3),
    "palette": (lambda: encoded(Image.new("RGB", (9, 9), (200, 30, 90)).quantize(4), "PNG"), [200, 30, 90]),
    "alpha": (lambda: encoded(Image.new("RGBA", (9, 9), (0, 100, 200, 0)), "PNG"), [255] * 3),
    "half alpha": (lambda: encoded(Image.new("LA", (9, 9), (0, 128)), "PNG"), [127] * 3),
    "transparent": (lambda: encoded(Image.new("L", (9, 9), 77), "PNG", transparency=77), [255] * 3),
    "cmyk": (lambda: encoded(Image.new("CMYK", (9, 9), (255, 0, 0, 0)), "TIFF"), [0, 255, 255]),
    "lab": (lambda: encoded(Image.new("LAB", (9, 9), (255, 128, 128)), "TIFF"), [255, 255, 255]),
}


def png(bits: int, kind: int, row: bytes, transparent: bytes, side: int = 4) -> bytes:
    """A PNG of equal rows, as Pillow cannot write it; kind 0 is gray, 2 is RGB."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", side, side, bits, kind, 0, 0, 0)
    pixels = zlib.compress((b"\0" + row) * side)
    parts = ((b"IHDR", head), (b"tRNS", transparent), (b"IDAT", pixels), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


RGB16 = struct.pack(">HHH", 0x0102, 0x4005, 0x80FF)
FLAT |= {
    "16-bit transparent": (
        lambda: encoded(Image.fromarray(np.full((9, 9), 5000, np.uint16)), "PNG", transparency=5000),
        [255] * 3,
    ),
    "16-bit another transparent": (
        lambda: encoded(Image.fromarray(np.full((9, 9), 257 * 9, np.uint16)), "PNG", transparency=5000),
        [9] * 3,
    ),
    "4-bit transparent": (lambda: png(4, 0, b"\x55\x55", b"\0\5"), [255] * 3),
    "2-bit transparent": (lambda: png(2, 0, b"\x55", b"\0\1"), [255] * 3),
    "1-bit transparent": (lambda: png(1, 0, b"\xff", b"\0\1"), [255] * 3),
    "16-bit RGB transparent": (lambda: png(16, 2, RGB16 * 4, RGB16), [255] * 3),
    "16-bit RGB another transparent": (lambda: png(16, 2, RGB16 * 4, bytes(6)), [1, 64, 128]),
    "RGB transparent": (
        lambda: encoded(Image.new("RGB", (9, 9), (1, 2, 3)), "PNG", transparency=(1, 2, 3)),
        [255] * 3,
    ),
    "palette transparent": (
        lambda: encoded(Image.new("RGB", (9, 9), (200, 30, 90)).quantize(4), "PNG", transparency=bytes(4)),
        [255] * 3,
    ),
    "gif": (lambda: encoded(Image.new("RGB", (9, 9), (200, 30, 90)), "GIF"), [200, 30, 90]),
    "webp": (lambda: encoded(Image.new("RGBA", (9, 9), (0, 0, 0, 0)), "WEBP", lossless=True), [255] * 3),
}


@pytest.mark.parametrize("kind", FLAT)
def test_every_kind_of_picture_becomes_the_colour_decided(kind: str) -> None:
    data, expected = FLAT[kind]
    np.testing.assert_allclose(centre(data()), expected, atol=2)


def test_a_cmyk_jpeg_has_its_colours() -> None:
    data = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    np.testing.assert_allclose(centre(data), [254, 0, 0], atol=3)


def test_a_rotated_photograph_is_put_upright() -> None:
    image = Image.new("RGB", (40, 20))
    ImageDraw.Draw(image).rectangle([0, 0, 19, 19], fill=(255, 0, 0))  # red on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise: left becomes top
    upright = decode(encoded(image, "PNG", exif=exif))
    assert upright.size == (20, 40)
    assert upright.getpixel((10, 5)) == (255, 0, 0)
    assert upright.getpixel((10, 35)) == (0, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_that_of_pillow(orientation: int) -> None:
    image, exif = picture(0, (12, 8)), Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, "PNG", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert np.array_equal(np.asarray(decode(data)), np.asarray(expected))


ODD_ENTRIES = {
    "text as a fraction": struct.pack("<HHII", 0x0131, 5, 1, 38),
    "number as text": struct.pack("<HHI", 0x0128, 2, 4) + b"ab\0\0",
    "number too large": struct.pack("<HHII", 0x0103, 4, 1, 70000),
    "beyond the block": struct.pack("<HHII", 0x0131, 2, 999, 99999),
}


@pytest.mark.parametrize("entry", ODD_ENTRIES)
def test_of_exif_the_orientation_alone_is_read(entry: str) -> None:
    plain = encoded(picture(0, (20, 10)), quality=90)
    orientation = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    block = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + orientation + ODD_ENTRIES[entry]
    block += struct.pack("<III", 0, 1, 3)
    data = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + plain[2:]
    turned = Image.open(io.BytesIO(plain)).transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(np.asarray(decode(data)), np.asarray(turned))


def test_an_exif_block_that_cannot_be_read_turns_nothing() -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("Raw profile type exif", "exif\n\n4\nno hex digits")
    data = encoded(picture(0, (20, 10)), "PNG", pnginfo=text)
    assert np.array_equal(np.asarray(decode(data)), np.asarray(picture(0, (20, 10))))


def test_only_the_first_frame_counts() -> None:
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue")]
    assert centre(encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:])) == [255, 0, 0]


@pytest.mark.parametrize(
    "data",
    [b"", b"<html>not found</html>", encoded(picture(0))[:-300], encoded(Image.new("F", (9, 9)), "TIFF"),
     encoded(Image.fromarray(np.full((9, 9), 70_000, np.int32)), "TIFF")],
    ids=["empty", "text", "truncated", "float", "wide"],
)  # fmt: skip
def test_what_is_no_whole_picture_raises(data: bytes) -> None:
    with pytest.raises((OSError, ValueError)):
        decode(data)


def test_no_other_format_is_opened_whatever_its_name(tmp_path: Path) -> None:
    """Pillow would start Ghostscript for the first of these."""
    for form in ("EPS", "ICO", "PCX", "SGI", "TGA"):
        path = tmp_path / f"{form}.jpg"
        Image.new("RGB", (16, 16)).save(path, form)
        with pytest.raises(Image.UnidentifiedImageError) as error:
            decode(path)
        assert reason(error.value) == "not a picture"


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"])
def test_a_picture_is_recognised_by_its_first_bytes(form: str) -> None:
    assert is_picture(encoded(picture(0), form)[:16])
    assert not is_picture(b"BM is how this text begins"[:16])


def test_sizes_are_bounded_before_anything_is_decoded(tmp_path: Path, monkeypatch) -> None:
    header = png(8, 0, b"", b"\0\0", side=10_000)  # its pixels are not there: nothing may look for them
    with pytest.raises(ValueError, match="10000x10000 pixels, more than max_pixels=67108864"):
        decode(header)
    monkeypatch.setattr(pictures, "MAX_BYTES", 100)
    (tmp_path / "x").write_bytes(bytes(500))
    for payload in (bytes(101), tmp_path / "x", Slice(tmp_path / "x", 50, 400)):
        with pytest.raises(ValueError, match="file of more than"):
            read(payload)
    assert read(Slice(tmp_path / "x", 490, 90)) == bytes(10)
    with pytest.raises(ValueError, match="wrong sum"):
        read(Unreadable("wrong sum"))


PEAK = """
import resource, sys
from pathlib import Path
from alexnet.data import pictures
from alexnet.data.pictures import decode
peaks = []
for path in ["small.png", *sys.argv[1:]]:
    decode(Path(path))
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
print(max(peaks) - peaks[0])
"""


def test_decoding_takes_at_most_16_bytes_per_pixel(tmp_path: Path) -> None:
    """The largest share of the memory that pictures.py states; 6 MB are allowed for what is not pixels."""
    side = 2048
    gray16 = Image.fromarray(np.zeros((side, side), np.uint16))
    modes = {mode: Image.new(mode, (side, side)) for mode in ("RGB", "RGBA", "LA", "CMYK", "L", "P")}
    for mode, image in modes.items():
        form = {"CMYK": "TIFF", "RGB": "BMP"}.get(mode, "PNG")
        options = {"transparency": 0} if mode in ("L", "P") else {}
        image.save(tmp_path / mode, form, **options)
    gray16.save(tmp_path / "I16", "PNG", transparency=0)
    modes["RGBA"].save(tmp_path / "webp", "WEBP", lossless=True)
    Image.new("RGBA", (8, 8)).save(tmp_path / "small.png")
    command = [sys.executable, "-c", PEAK, *modes, "I16", "webp"]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert int(ended.stdout) < 16 * side**2 + 6e6


def test_a_picture_below_the_least_side_raises() -> None:
    data = encoded(picture(0, (40, 7)))
    with pytest.raises(ValueError, match="40x7 pixels, below min_side=8"):
        decode(data, min_side=8)
    assert decode(data, min_side=7).size == (40, 7)


@pytest.mark.parametrize("resample", Resample)
@pytest.mark.parametrize("size", [(80, 48), (48, 80), (64, 64), (20, 12)])
def test_fit_is_short_side_then_central_crop(resample: Resample, size: tuple[int, int]) -> None:
    # against the two steps, with sizes where the scaled long side and the crop's offset are whole numbers
    image, px = picture(5, size), 32 if max(size) == 64 else 24
    scale = px / min(size)
    whole = (round(size[0] * scale), round(size[1] * scale))
    kernel = KERNELS.get(resample, Image.Resampling.BOX if scale <= 1 else Image.Resampling.BICUBIC)
    left, top = (whole[0] - px) // 2, (whole[1] - px) // 2
    expected = image.resize(whole, kernel).crop((left, top, left + px, top + px))
    difference = np.abs(np.asarray(fit(image, px, resample), int) - np.asarray(expected, int))
    assert difference.max() <= 2


def test_a_panorama_costs_no_memory() -> None:
    assert fit(Image.new("RGB", (60_000, 2)), 256, Resample.area).size == (256, 256)


def test_every_mode_of_pillow_is_converted_or_refused() -> None:
    modes = ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "LA", "PA", "RGBX", "RGBa", "I;16"]
    for mode in modes:
        assert to_rgb(Image.new(mode, (4, 4))).mode == "RGB", mode
    with pytest.raises(ValueError, match="floating"):
        to_rgb(Image.new("F", (4, 4)))
