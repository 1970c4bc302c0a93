"""The whole job in one sitting: images, network, loss, every gradient, the update of 2012, the error. No autograd.

    python -m alexnet.plain data/synthetic

trains `model=mini` (two towers, crops of 56 pixels) at the quickstart's width on a prepared store, step for step with
the bits of scripts/train.py trainer=cpu. What the trainer adds (configuration, checkpoints, resuming, fast backends,
GPUs) changes how the job is run, not what is computed.

Every x_forward and x_backward is derived in the file of its layer. They are plain functions of tensors: x_forward
returns its output and what x_backward needs of it; x_backward takes the gradient of the loss with respect to that
output, dy, and returns the gradients with respect to the inputs.

Shapes: N images, C maps of H x W pixels (N, C, H, W); kernels (O, C/towers, R, S); matrices (O, I).
"""

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from alexnet.data.augment import stream  # the random generator of one (seed, epoch, purpose)
from alexnet.data.store import Store, open_store
from alexnet.layers.conv2d import conv2d_backward, conv2d_forward
from alexnet.layers.cross_entropy import cross_entropy_backward, cross_entropy_forward
from alexnet.layers.dropout import dropout_backward, dropout_forward, dropout_key
from alexnet.layers.linear import linear_backward, linear_forward
from alexnet.layers.local_response_norm import local_response_norm_backward, local_response_norm_forward
from alexnet.layers.max_pool2d import max_pool2d_backward, max_pool2d_forward
from alexnet.layers.relu import relu_backward, relu_forward

Tensors = dict[str, Tensor]

CROP = 56  # pixels, of a stored image's 64
# Kernels (O, C/towers, R, S), stride, zeros (left, right, top, bottom) and towers of a convolution.
CONVOLUTIONS = {
    "conv1": ((48, 3, 7, 7), (2, 2), (1, 2, 1, 2), 1),
    "conv2": ((128, 24, 5, 5), (1, 1), (2, 2, 2, 2), 2),
    "conv3": ((192, 128, 3, 3), (1, 1), (1, 1, 1, 1), 1),
    "conv4": ((192, 96, 3, 3), (1, 1), (1, 1, 1, 1), 2),
    "conv5": ((128, 96, 3, 3), (1, 1), (1, 1, 1, 1), 2),
}
HIDDEN = 1024
NORM = (
    5,
    1e-4,
    0.75,
    2.0,
    2,
)  # size, alpha (divided by size, as in the 2012 code), beta, k (section 3.3); towers
POOL = (
    (3, 3),
    (2, 2),
    (0, 0),
    True,
    "all",
)  # kernel, stride, zeros, rounded up; all tied maxima get the gradient
# Standard deviation and fan-in in the 2012 code, and first bias (layers-145.cfg); std grows as the fan-in shrinks.
INIT = {
    "conv1": (0.01, 363, 0.0), "conv2": (0.01, 1200, 1.0), "conv3": (0.03, 2304, 0.0), "conv4": (0.03, 1728, 1.0),
    "conv5": (0.03, 1728, 1.0), "fc6": (0.01, 9216, 1.0), "fc7": (0.01, 4096, 1.0), "fc8": (0.01, 4096, 0.0),
}  # fmt: skip
LR, MOMENTUM, DECAY = 0.01, 0.9, 5e-4


def initial_weights(classes: int, seed: int) -> Tensors:
    """{name.weight, name.bias}: each weight drawn from (seed, its name)."""
    flat = CONVOLUTIONS["conv5"][0][0] * 3 * 3  # conv5's maps after pooling are 3 x 3
    shapes = {name: layer[0] for name, layer in CONVOLUTIONS.items()}
    shapes |= {"fc6": (HIDDEN, flat), "fc7": (HIDDEN, HIDDEN), "fc8": (classes, HIDDEN)}
    w = {}
    for name, (std, fan_in, bias) in INIT.items():
        digest = hashlib.sha256(f"{seed}/{name}.weight".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        weight = torch.empty(shapes[name])
        weight.normal_(0.0, std * (fan_in / weight[0].numel()) ** 0.5, generator=generator)
        w |= {f"{name}.weight": weight, f"{name}.bias": torch.full((len(weight),), bias)}
    return w


def batches(store: Store, rows: Tensor, size: int, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The epoch's batches: every image once, a random crop of it, mirrored or not."""
    n, margin = len(rows), store.px - CROP
    order = torch.randperm(n, generator=stream(seed, epoch, "order"))
    corners = torch.randint(0, margin + 1, (n, 2), generator=stream(seed, epoch, "crop"))
    mirrored = torch.rand(n, generator=stream(seed, epoch, "flip")) < 0.5

    def crop(i: int) -> Tensor:
        top, left = corners[i].tolist()
        image = torch.tensor(store.images[rows[i], top : top + CROP, left : left + CROP])
        return image.flip(1) if mirrored[i] else image

    for batch in order.split(size):
        crops = torch.stack([crop(i) for i in batch.tolist()])
        yield network_input(crops, store), torch.tensor(store.labels[rows[batch]], dtype=torch.int64)


def middle(images: Tensor) -> Tensor:
    """(..., px, px, 3) -> the crop in the middle."""
    start = (images.shape[-2] - CROP) // 2
    return images[..., start : start + CROP, start : start + CROP, :]


def network_input(crops: Tensor, store: Store) -> Tensor:
    """(N, c, c, 3) bytes -> (N, 3, c, c) numbers: less the middle of the mean image (section 2)."""
    return (crops.float() - middle(torch.tensor(store.mean, dtype=torch.float32))).permute(0, 3, 1, 2)


def forward(w: Tensors, x: Tensor, key: int | None) -> tuple[Tensor, list[tuple[str, tuple]]]:
    """Logits (N, classes), and for each operation what its backward needs. `key` names the dropout masks; None: test."""
    saved: list[tuple[str, tuple]] = []

    def keep(name: str, result: tuple, *constants: object) -> Tensor:
        saved.append((name, (*result[1:], *constants)))
        return result[0]

    for name, (_, *window) in CONVOLUTIONS.items():
        x = keep(name, conv2d_forward(x, w[f"{name}.weight"], w[f"{name}.bias"], *window), *window)
        x = keep("relu", relu_forward(x))
        if name in ("conv1", "conv2"):
            x = keep("norm", local_response_norm_forward(x, *NORM), *NORM)
        if name in ("conv1", "conv2", "conv5"):
            x = keep("pool", max_pool2d_forward(x, *POOL), x.shape[-2:], *POOL)
    x = keep("flatten", (x.flatten(1), x.shape))
    for number, name in ((6, "fc6"), (7, "fc7")):
        x = keep(name, linear_forward(x, w[f"{name}.weight"], w[f"{name}.bias"]))
        x = keep("relu", relu_forward(x))
        if key is None:
            x = x * 0.5  # section 4.2: at test time all units, halved
        else:
            mask = (0.5, 0, 1.0)  # p, first row, scale
            x = keep("dropout", dropout_forward(x, torch.tensor(key + number), *mask), *mask)
    return keep("fc8", linear_forward(x, w["fc8.weight"], w["fc8.bias"])), saved


def backward(dy: Tensor, saved: list[tuple[str, tuple]]) -> Tensors:
    """The chain rule from the last operation to the first: gradients by the names of the weights."""
    g: Tensors = {}
    for name, kept in reversed(saved):
        if name.startswith("conv"):
            dy, g[f"{name}.weight"], g[f"{name}.bias"] = conv2d_backward(
                dy, *kept, (name != "conv1", True, True)
            )
        elif name.startswith("fc"):
            dy, g[f"{name}.weight"], g[f"{name}.bias"] = linear_backward(dy, *kept, (True, True, True))
        elif name == "flatten":
            dy = dy.reshape(kept[0])
        else:
            dy = BACKWARD[name](dy, *kept)
    return g


BACKWARD = {
    "relu": relu_backward,
    "norm": local_response_norm_backward,
    "pool": max_pool2d_backward,
    "dropout": dropout_backward,
}


def update(w: Tensors, g: Tensors, v: Tensors, lr: float) -> None:
    """v <- 0.9 v - 0.0005 lr w - lr g;  w <- w + v, in place (section 5). Biases are not decayed (2012 code)."""
    for name, weight in w.items():
        v[name].mul_(MOMENTUM)
        if name.endswith("weight"):
            v[name].add_(weight, alpha=-DECAY * lr)
        weight.add_(v[name].add_(g[name], alpha=-lr))


def rate(progress: float) -> float:
    """One cycle: up for a quarter of training, then down to zero."""
    return LR * (max(progress / 0.25, 0.01) if progress < 0.25 else 1.0 - (progress - 0.25) / 0.75)


def train(root: str, epochs: int = 5, size: int = 48, seed: int = 0) -> tuple[Tensors, list[float]]:
    """Weights, and the loss of every step."""
    store = open_store(Path(root) / "train")
    rows, holdout = (torch.from_numpy(part) for part in store.holdout())
    w = initial_weights(len(store.classes), seed)
    v = {name: torch.zeros_like(weight) for name, weight in w.items()}
    losses: list[float] = []
    steps = epochs * -(-len(rows) // size)
    for epoch in range(epochs):
        for x, labels in batches(store, rows, size, seed, epoch):
            logits, saved = forward(w, x, dropout_key(seed, len(losses), 0))
            loss, *kept = cross_entropy_forward(logits, labels, 0.0, "mean")
            g = backward(cross_entropy_backward(torch.ones(()), *kept, 0.0, "mean"), saved)
            update(w, g, v, rate(len(losses) / steps))
            losses.append(float(loss))
        print(
            f"epoch {epoch + 1}: loss {losses[-1]:.3f}, holdout error {100 * error(w, store, holdout):.1f} %"
        )
    return w, losses


def error(w: Tensors, store: Store, rows: Tensor) -> float:
    """The share of images whose middle crop is given another class than theirs."""
    logits, _ = forward(w, network_input(middle(torch.tensor(store.images[rows])), store), key=None)
    return float((logits.argmax(1) != torch.tensor(store.labels[rows])).float().mean())


if __name__ == "__main__":
    torch.set_float32_matmul_precision("highest")
    train(sys.argv[1])
