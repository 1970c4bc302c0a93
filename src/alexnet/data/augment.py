"""Random crops, flips and colour noise, and the ten views of a test image (section 4.1).

One image passes through

    crop (px -> crop_px)  ->  mirror  ->  minus the mean  ->  plus colour noise  ->  times a scale

and the whole batch passes at once, on whatever device it lives. What follows the mirror is arithmetic on each number
alone; compiled, it is one pass over memory instead of three (on a CPU with the same bits). On a GPU the mirror is part
of that pass, which is then one kernel.

Colour noise. Write a pixel as a vector x = (R, G, B) in 0..255 and let S be the 3x3 covariance of all training
pixels. S is symmetric and positive, so S = V diag(l1, l2, l3) V' with orthonormal columns V = (v1, v2, v3): along
v_i the pixels vary with *variance* l_i, that is with standard deviation sqrt(l_i). v1 is close to grey, so its term
is a change of brightness. Each image gets one draw a1, a2, a3 ~ N(0, colour_std^2), and every pixel of it

    x  ->  x + a1 s1 v1 + a2 s2 v2 + a3 s3 v3

What s is, is the question:

    stdev       s_i = sqrt(l_i)    what the 2012 code does (`color_stdevs`). On ImageNet s1 = 122 levels, times 0.1
                                   = 12 levels. Noise then has exactly colour_std times the images' own spread.
    eigenvalue  s_i = l_i / 255    what the paper prints, p_i a_i l_i, read in 0..1 pixels: the eigenvalues of
                                   x/255 are l_i / 255^2, and 255 turns the sum back into levels (5.8 on ImageNet).
    literal     s_i = l_i          what the paper prints, in the 0..255 pixels it trains on: 1,483 levels, which
                                   no image survives. Kept because a printed claim deserves its literal test.

The 2012 code divides the noisy, centred image by 1 + colour_std ("so that the overall scale of the training data
doesn't become too different from the test data"); the paper does not say so. `colour_divide` is that switch.

Mean image. The 2012 code subtracts the *centre crop* of the mean image from every crop, wherever that crop was taken,
and does not mirror it; so do we. (Caffe subtracts at the matching offset; the difference is 1 to 2 levels.)

Who draws what. The draws of one epoch are one table, made on the CPU from (seed, epoch), so nothing depends on the
number of workers or devices, on the batch an image falls into, or on where a run was resumed. `per_image` tables are
indexed by the image; `per_32` tables by position // 32 in the epoch's order: the 2012 code draws crop and flip once for
32 consecutive images (`crop_chunk`). Colour is always per image, as in 2012. Crop, flip, colour and order are separate
streams: an arm of an ablation that switches one off keeps the others.

Shapes: N images, px stored side, c = crop_px; images (N, px, px, 3) uint8, out (N, 3, c, c) float32, channels last.
"""

import hashlib
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from alexnet.compile import batched, compiled
from alexnet.data.store import Store
from alexnet.errors import UserError

CHUNK = 32  # images that share one draw in the 2012 code (crop_chunk)
SLAB = 1 << 19  # pixels x channels that a CPU augments at a time: 2 MB of float32


Crop = StrEnum("Crop", "per_image per_32 centre")
Flip = StrEnum("Flip", "per_image per_32 none")
Colour = StrEnum("Colour", "none stdev eigenvalue literal")


class InputScale(StrEnum):
    mean_image = "mean_image"  # x - mean[row, column, channel]
    mean_channel = "mean_channel"  # x - mean[channel]
    normalised = "normalised"  # (x - mean[channel]) / std[channel]


@dataclass
class AugmentConfig:
    """What is done to an image between the store and the network. The defaults are the paper's."""

    crop_px: int = 224
    crop: Crop = Crop.per_image
    flip: Flip = Flip.per_image
    input: InputScale = InputScale.mean_image
    colour: Colour = Colour.eigenvalue
    colour_std: float = 0.1  # of the draws a_i (section 4.1)
    colour_divide: bool = False  # the noisy image / (1 + colour_std), as the 2012 code
    colour_until: float = 1.0  # fraction of the epochs after which the noise is off (2012: 67 of 90)

    def margin(self, px: int) -> int:
        """px - crop_px: crops start at 0..margin inclusive. UserError if the stored images are too small."""
        if not 0 < self.crop_px <= px:
            raise UserError(
                f"augment.crop_px={self.crop_px} (the network's image) does not fit into the store's "
                f"{px}-pixel images: choose a network of smaller images (model=mini or tiny: 56), or prepare the data "
                "with a larger px"
            )
        return px - self.crop_px


class Draws(NamedTuple):
    """What chance decides about N images, in the order in which they are visited."""

    top: Tensor  # (N,) int64, 0..px-crop_px inclusive
    left: Tensor  # (N,) int64
    flip: Tensor  # (N,) bool
    colour: Tensor  # (N, 3) float32 standard normals

    def rows(self, start: int, stop: int) -> "Draws":
        return Draws(*(table[start:stop] for table in self))

    def to(self, device: torch.device | str) -> "Draws":
        return Draws(*(table.to(device) for table in self))


def stream(seed: int, epoch: int, what: str) -> torch.Generator:
    """A CPU generator of its own for each (seed, epoch, what): hashed, so neighbours are unrelated."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{what}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def draw_epoch(config: AugmentConfig, order: Tensor, px: int, seed: int, epoch: int) -> Draws:
    """The draws of one epoch, row i for the i-th image visited.

    order (N,) int64 is the permutation of the images 0..N-1 in which the epoch visits them. Row i depends on
    order[i] where the rule is per_image (and always for colour), on i // 32 where it is per_32.
    """
    margin, n = config.margin(px), len(order)
    by_image, by_chunk = order, torch.arange(n) // CHUNK
    offsets = torch.full((n, 2), margin // 2)
    if config.crop != Crop.centre:
        table = torch.randint(0, margin + 1, (n, 2), generator=stream(seed, epoch, "crop"))
        offsets = table[by_image if config.crop == Crop.per_image else by_chunk]
    flip = torch.zeros(n, dtype=torch.bool)
    if config.flip != Flip.none:
        table = torch.rand(n, generator=stream(seed, epoch, "flip")) < 0.5
        flip = table[by_image if config.flip == Flip.per_image else by_chunk]
    colour = torch.randn(n, 3, generator=stream(seed, epoch, "colour"))[by_image]
    return Draws(offsets[:, 0].contiguous(), offsets[:, 1].contiguous(), flip, colour)


def statistics_of(store: Store) -> dict[str, Tensor]:
    """What `Augment` needs of a train store, 0..255 units: mean (px, px, 3), channel_mean (3,), covariance (3, 3)."""
    if store.mean is None:
        raise UserError(f"{store.path} has no mean image: give the train store, not the validation store")
    return {
        "mean": torch.tensor(store.mean, dtype=torch.float32),
        "channel_mean": torch.tensor(store.manifest["channel_mean"], dtype=torch.float64),
        "covariance": torch.tensor(store.manifest["covariance"], dtype=torch.float64),
    }


def principal_colours(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (3,), largest first, and eigenvectors (3, 3) in columns of the covariance of RGB.

    An eigenvector's sign is free; here its largest component is positive, so every machine gets the same noise.
    """
    values, vectors = torch.linalg.eigh(covariance.to(torch.float64))
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return values, vectors * largest.sign()


class Augment(nn.Module):
    """Turns stored uint8 images into the network's input: `forward` in training, `centre` and `ten_views` in tests.

    statistics: what `statistics_of` returns, or None when a checkpoint will fill the buffers. All buffers are
    float32, in 0..255 units, and saved with the model, so evaluation needs no training data:
    mean (c, c, 3) for mean_image, else (3,); std (3,); eigenvalues (3,); eigenvectors (3, 3) in columns.
    in_one_pass: training images go through `torch.compile`; on a CPU the result is the same to the bit.
    """

    mean: Tensor
    std: Tensor
    eigenvalues: Tensor
    eigenvectors: Tensor

    def __init__(
        self,
        config: AugmentConfig,
        px: int,
        statistics: dict[str, Any] | None = None,
        in_one_pass: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.px, self.in_one_pass = config, px, in_one_pass
        self.margin = config.margin(px)
        self.divisor = 1 + config.colour_std if config.colour_divide else 1.0
        side = config.crop_px
        per_pixel = config.input == InputScale.mean_image
        self.register_buffer("mean", torch.zeros((side, side, 3) if per_pixel else (3,)))
        self.register_buffer("std", torch.ones(3))
        self.register_buffer("eigenvalues", torch.zeros(3))
        self.register_buffer("eigenvectors", torch.eye(3))
        if statistics is not None:
            self._fill({key: torch.as_tensor(value) for key, value in statistics.items()})

    def _fill(self, statistics: dict[str, Tensor]) -> None:
        values, vectors = principal_colours(statistics["covariance"])
        mean = statistics["channel_mean"]
        if self.config.input == InputScale.mean_image:
            mean = self._cut(statistics["mean"][None], self.margin // 2, self.margin // 2)[0]
        self.mean.copy_(mean)
        self.std.copy_(statistics["covariance"].diagonal().sqrt())
        self.eigenvalues.copy_(values)
        self.eigenvectors.copy_(vectors)

    def forward(self, images: Tensor, draws: Draws, colour_on: bool = True) -> Tensor:
        """images (N, px, px, 3) uint8 and their draws -> (N, 3, c, c) float32. Colour noise only if `colour_on`."""
        check_side(images, self.px)
        rows = torch.arange(len(images), device=images.device)
        starts = crop_starts(rows, draws.top, draws.left, self.px, self.px)
        return self.from_crops(crops_at(images.contiguous(), starts, self.config.crop_px), draws, colour_on)

    def from_crops(self, crops: Tensor, draws: Draws, colour_on: bool = True) -> Tensor:
        """The same from crops (N, c, c, 3) uint8, as the loader cuts them (data/module.py).

        Not in one pass, a CPU goes slab by slab, each of which stays in its cache; a GPU takes the batch whole.
        """
        side, n = self.config.crop_px, len(crops)
        check_side(crops, side)
        normals = draws.colour if colour_on and self.config.colour != Colour.none else None
        if self.in_one_pass and crops.device.type == "cuda":
            return self._in_one_kernel(crops, draws.flip, normals)
        noise = None if normals is None else self.colour_noise(normals).repeat(1, side)
        out = torch.empty(n, side, side, 3, device=crops.device)
        several = crops.device.type == "cpu" and not self.in_one_pass
        step = max(SLAB // (side * side * 3) if several else n, 1)
        for slab in (slice(start, start + step) for start in range(0, n, step)):
            mirrored = mirror(crops[slab], draws.flip[slab])
            self._to_input(mirrored, None if noise is None else noise[slab], out[slab], self.in_one_pass)
        return out.permute(0, 3, 1, 2)

    def _in_one_kernel(self, crops: Tensor, flip: Tensor, normals: Tensor | None) -> Tensor:
        crops, flip = batched(crops, flip)
        normals = None if normals is None else batched(normals)[0]
        std = self.std if self.config.input == InputScale.normalised else None
        out = compiled_augment(crops, flip, normals, self.mean, std, self.divisor, self._colour)
        return out.permute(0, 3, 1, 2)

    def centre(self, images: Tensor) -> Tensor:
        """The single view: images (N, px, px, 3) -> (N, 3, c, c)."""
        return self._to_input(self._cut(images, self.margin // 2, self.margin // 2)).permute(0, 3, 1, 2)

    def ten_views(self, images: Tensor) -> Tensor:
        """Four corners and the centre, then their mirror images (section 4.1): -> (N, 10, 3, c, c)."""
        end, half = self.margin, self.margin // 2
        corners = [(0, 0), (0, end), (end, 0), (end, end), (half, half)]
        views = torch.stack([self._cut(images, top, left) for top, left in corners], dim=1)
        views = torch.cat([views, views.flip(3)], dim=1)
        return self._to_input(views.flatten(0, 1)).unflatten(0, (-1, 10)).permute(0, 1, 4, 2, 3)

    def colour_noise(self, normals: Tensor) -> Tensor:
        """`colour_noise` of normals (N, 3) by this module's statistics and rule."""
        return colour_noise(normals, *self._colour)

    @property
    def _colour(self) -> tuple[Tensor, Tensor, Colour, float]:
        return self.eigenvalues, self.eigenvectors, self.config.colour, self.config.colour_std

    def _cut(self, images: Tensor, top: int, left: int) -> Tensor:
        """The same window of every image: (N, px, px, 3) -> (N, c, c, 3)."""
        side = self.config.crop_px
        return images[:, top : top + side, left : left + side]

    def _to_input(
        self, crops: Tensor, noise: Tensor | None = None, out: Tensor | None = None, in_one_pass: bool = False
    ) -> Tensor:
        """(N, c, c, 3) uint8 -> `to_input` of them, float32 of the same shape; noise (N, c * 3)."""
        config, side = self.config, self.config.crop_px
        out = torch.empty(crops.shape, device=crops.device) if out is None else out
        lines, rows = out.view(-1, side, side * 3), crops.reshape(-1, side, side * 3)
        per_pixel = config.input == InputScale.mean_image
        mean = self.mean.view(side, side * 3) if per_pixel else self.mean.repeat(side)
        std = self.std.repeat(side) if config.input == InputScale.normalised else None
        if in_one_pass:
            lines, rows = batched(lines, rows)
            noise = None if noise is None else batched(noise)[0]
            compiled_to_input(lines, rows, mean, noise, self.divisor, std)
        else:
            to_input(lines, rows, mean, noise, self.divisor, std)
        return out

    def extra_repr(self) -> str:
        c = self.config
        return (
            f"{self.px} -> {c.crop_px} px, crop={c.crop}, flip={c.flip}, input={c.input}, colour={c.colour}"
        )


def check_side(images: Tensor, side: int) -> None:
    """ValueError unless the images are (N, side, side, 3): whole images and crops are not taken for each other."""
    if images.shape[1:] != (side, side, 3):
        raise ValueError(f"images of shape {tuple(images.shape)} must be (N, {side}, {side}, 3)")


def colour_noise(
    normals: Tensor, eigenvalues: Tensor, eigenvectors: Tensor, colour: Colour, std: float
) -> Tensor:
    """a_i s_i v_i summed over i: normals (N, 3) -> what is added to R, G and B of each image, (N, 3).

    Three products and two sums instead of a matrix product, whose rounding may depend on N and on autocast.
    """
    strength = {
        Colour.stdev: eigenvalues.sqrt(),
        Colour.eigenvalue: eigenvalues / 255,
        Colour.literal: eigenvalues,
    }[colour]
    along, v = normals * (std * strength), eigenvectors
    return along[:, :1] * v[:, 0] + along[:, 1:2] * v[:, 1] + along[:, 2:] * v[:, 2]


def to_input(
    out: Tensor, rows: Tensor, mean: Tensor, noise: Tensor | None, divisor: float, std: Tensor | None
) -> None:
    """Writes ((rows - mean + noise) / divisor) / std to `out`; without noise no divisor.

    Rows of c pixels x 3 channels, so that a CPU's innermost loop is long: out (N, c, c * 3) float32, rows the same in
    uint8, mean (c, c * 3) or (c * 3,), noise (N, c * 3), std (c * 3,). Or pixels: out and rows (N, c, c, 3), mean
    (c, c, 3) or (3,), noise (N, 1, 3), std (3,).
    """
    out.copy_(rows)
    out -= mean
    if noise is not None:
        out += noise[:, None]
        if divisor != 1:
            out /= divisor
    if std is not None:
        out /= std


def augment_in_one_kernel(
    crops: Tensor,
    flip: Tensor,
    normals: Tensor | None,
    mean: Tensor,
    std: Tensor | None,
    divisor: float,
    colour: tuple[Tensor, Tensor, Colour, float],
) -> Tensor:
    """crops (N, c, c, 3) uint8 -> mirrored and as `to_input` makes them, float32 of the same shape.

    Compiled for CUDA it is one kernel, which makes the noise (`colour` is the rest of `colour_noise`'s arguments) of
    each pixel anew instead of reading it. On a CPU the mirror is faster as a pass of its own.
    """
    noise = None if normals is None else colour_noise(normals, *colour)[:, None]
    out = torch.empty(crops.shape, device=crops.device)
    to_input(out, mirror_without_waiting(crops, flip), mean, noise, divisor, std)
    return out


compiled_to_input = compiled(to_input)
compiled_augment = compiled(augment_in_one_kernel)


def crop_starts(rows: Tensor, top: Tensor, left: Tensor, height: int, width: int) -> Tensor:
    """Where in an array (M, height, width, 3) the crops of its images `rows` begin, in elements: all (N,) int64."""
    return ((rows * height + top) * width + left) * 3


def crops_at(images: Tensor, starts: Tensor, side: int, out: Tensor | None = None) -> Tensor:
    """The crops that begin at `starts` (N,) of contiguous images (M, H, W, 3): (N, side, side, 3), written to `out`.

    A view that holds the crop beginning at *every* element (overlapping, without memory of its own) makes the batch
    one `index_select`. It copies rows of `side` pixels, many times faster than indexing pixel by pixel; nothing
    outside a crop is read.
    """
    line, run = images.shape[2] * 3, side * 3
    extent = (side - 1) * line + run  # from a crop's first element to its last
    crops = images.as_strided((images.numel() - extent + 1, side, run), (1, line, 1))
    out = None if out is None else out.view(len(starts), side, run)
    return torch.index_select(crops, 0, starts, out=out).view(len(starts), side, side, 3)


def mirror(crops: Tensor, flip: Tensor) -> Tensor:
    """A copy of the crops (N, c, c, 3) in which those whose flip (N,) is true are mirrored left to right.

    A CPU goes through those to be mirrored: 8 us and the copy for an image of 224 pixels, against 30 for both versions.
    """
    if crops.device.type != "cpu":
        return mirror_without_waiting(crops, flip)
    crops = crops.clone()
    for i in flip.nonzero()[:, 0].tolist():
        crops[i] = crops[i].flip(1)
    return crops


def mirror_without_waiting(crops: Tensor, flip: Tensor) -> Tensor:
    """The same for a GPU: both versions are made and one is chosen per image, so no shape depends on the draws."""
    return torch.where(flip[:, None, None, None], crops.flip(2), crops)
