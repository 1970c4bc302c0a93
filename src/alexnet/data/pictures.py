"""One picture: an encoded file becomes the px x px square of 8-bit RGB that a store holds.

The rule of 2012 (section 2): scale so that the short side is `px`, keep the central px x px. Both happen in one
antialiased resampling of the central square. The paper names no filter; the default is that of the author's later code
(area average down, cubic up).

What each kind of picture becomes (always 8-bit RGB):

    RGB, YCbCr, LAB, HSV   converted
    grayscale, bilevel     three equal channels
    16-bit grayscale       divided by 257 and rounded (Pillow by itself would clip it to white)
    16-bit RGB             the high byte (Pillow's reading); of a transparent colour too
    CMYK                   Pillow's conversion, no colour profile; Adobe's inverted files are inverted back
    palette                its colours
    transparency           laid over white, whether it is a channel or one transparent colour
    several frames         the first
    EXIF orientation       applied; nothing else of the EXIF block is read
    other colour profiles  ignored, as is usual with ImageNet
    short side < px        enlarged (counted in the manifest)

A bad file: short side below `min_side`, more than `max_pixels` pixels, more than MAX_BYTES bytes, floating point,
truncated, empty, or none of FORMATS. Both sizes are known before anything is decoded, so a decoding process needs at
most 16 bytes for each of `max_pixels` pixels (copies of the picture, four bytes a pixel each) and MAX_BYTES for the
file: 1.3 GB by default.
"""

import io
import warnings
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

# Every other format is refused: Pillow would start Ghostscript for an EPS file.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "TIFF", "WEBP")
ENDINGS = (".jpeg", ".jpg", ".png", ".gif", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*")
HEAD = 16  # bytes that `is_picture` needs
MAX_BYTES = 1 << 28  # of an encoded file
MAX_PIXELS = 1 << 26  # 8192 x 8192
_TURNS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
TURNS = {code: Image.Transpose[name] for code, name in enumerate(_TURNS.split(), 2)}  # by EXIF orientation


class Resample(StrEnum):
    area = "area"  # area average down, cubic up
    bilinear = "bilinear"
    bicubic = "bicubic"
    lanczos = "lanczos"


class Slice(NamedTuple):
    """A part of a file: where a member of an archive lies."""

    path: Path
    offset: int
    size: int


class Unreadable(NamedTuple):
    """What an archive gives instead of a damaged member."""

    reason: str


Payload = bytes | Path | Slice | Unreadable | np.ndarray  # an encoded file, or pixels (px, px, 3)


def is_picture(head: bytes) -> bool:
    """Whether a file that begins with `head` (HEAD bytes) is a picture, whatever its name."""
    webp, bmp = head[:4] == b"RIFF" and head[8:12] == b"WEBP", head[:2] == b"BM" and head[6:10] == bytes(4)
    return head.startswith(MAGIC) or webp or bmp


def decode(
    payload: bytes | Path | Slice | Unreadable, min_side: int = 1, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """An encoded picture as upright 8-bit RGB. Raises whatever Pillow raises, and ValueError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd EXIF blocks; the pixels are fine
        with Image.open(io.BytesIO(read(payload)), formats=FORMATS) as picture:
            width, height = picture.size
            if min(width, height) < min_side:
                raise ValueError(f"{width}x{height} pixels, below min_side={min_side}")
            if width * height > max_pixels:
                raise ValueError(f"{width}x{height} pixels, more than max_pixels={max_pixels}")
            raw_mode = picture.tile[0][3] if picture.format == "PNG" and picture.tile else None
            picture.load()
            # Pillow keeps the transparent colour of a PNG as it stands in the file, not as it converts the pixels.
            if (colour := picture.info.get("transparency")) is not None:
                if raw_mode == "RGB;16B":
                    picture.info["transparency"] = tuple(value >> 8 for value in colour)
                elif raw_mode in ("L;2", "L;4"):  # whose levels are spread over 0..255
                    picture.info["transparency"] = colour * {"L;2": 85, "L;4": 17}[raw_mode]
            orientation = None
            with suppress(Exception):  # a block that cannot be read turns nothing
                orientation = picture.getexif().get(0x0112)
            converted = to_rgb(picture)
    return converted.transpose(TURNS[orientation]) if orientation in TURNS else converted


def read(payload: bytes | Path | Slice | Unreadable) -> bytes:
    """The bytes of a file; ValueError if there are none, or more than MAX_BYTES."""
    if isinstance(payload, Unreadable):
        raise ValueError(payload.reason)
    if not isinstance(payload, bytes):
        path, offset, size = payload if isinstance(payload, Slice) else (payload, 0, MAX_BYTES + 1)
        with open(path, "rb") as file:
            file.seek(offset)
            payload = file.read(min(size, MAX_BYTES + 1))
    if not payload:
        raise ValueError("empty file")
    if len(payload) > MAX_BYTES:
        raise ValueError(f"a file of more than {MAX_BYTES >> 20} MiB")
    return payload


def reason(error: Exception) -> str:
    """In a few words, why a file is bad."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "not a picture"
    if isinstance(error, FileNotFoundError):
        return "link to a missing file" if Path(error.filename).is_symlink() else "the file is gone"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


def to_rgb(picture: Image.Image) -> Image.Image:
    """Any mode of Pillow -> RGB. Raises ValueError for floating point and for integers above 16 bits."""
    if picture.mode == "F":
        raise ValueError("floating-point picture")
    if picture.mode.startswith("I"):  # I;16, its byte orders, and I, in which older Pillow opens 16-bit PNG
        picture = _from_16_bits(picture)
    if picture.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        opaque = Image.new("RGB", picture.size, "white")
        opaque.paste(picture, mask=picture)
        return opaque
    return picture.convert("RGB")


def _from_16_bits(picture: Image.Image) -> Image.Image:
    values = np.asarray(picture)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("integers of more than 16 bits")
    gray = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if "transparency" in picture.info:
        gray[values == picture.info["transparency"]] = 255
    return Image.fromarray(gray)


def fit(picture: Image.Image, px: int, resample: Resample) -> Image.Image:
    """Short side to `px`, central square: the two steps of 2012 in one resampling."""
    width, height = picture.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    if resample == Resample.area:
        kernel = Image.Resampling.BOX if side >= px else Image.Resampling.BICUBIC
    else:
        kernel = Image.Resampling[resample.upper()]
    return picture.resize((px, px), kernel, box=(left, top, left + side, top + side))
