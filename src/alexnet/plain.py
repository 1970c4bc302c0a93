"""The whole job in one sitting: images, network, loss, every gradient, the update of 2012, the error. No autograd.

    python -m alexnet.plain data/synthetic

trains the quickstart's network (`mini` at half width, crops of 56 pixels) on a prepared store. On a CPU every step has
the bits of scripts/train.py, which adds configuration, checkpoints, fast backends and GPUs.

x_forward and x_backward are derived in the file of layer x. The first returns its output and what the second needs;
the second takes dy, the gradient of the loss with respect to that output, and returns the gradients of the inputs.
Shapes: N images, C maps of H x W pixels (N, C, H, W); kernels (O, C/towers, R, S); matrices (O, I).
"""

import hashlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

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

Weights = Mapping[str, Any]  # {name: (weight, bias)}
CROP, LR, MOMENTUM, DECAY = 56, 0.01, 0.9, 5e-4  # pixels of a stored image's 64; section 5
MIDDLE = (..., slice(4, 60), slice(4, 60), slice(None))  # (..., 64, 64, 3) -> the 56 pixels in the middle
# (O, C/towers, R, S), stride, zeros (left, right, top, bottom), towers.
CONVOLUTIONS: dict[str, Any] = {
    "conv1": ((48, 3, 7, 7), (2, 2), (1, 2, 1, 2), 1),
    "conv2": ((128, 24, 5, 5), (1, 1), (2, 2, 2, 2), 2),
    "conv3": ((192, 128, 3, 3), (1, 1), (1, 1, 1, 1), 1),
    "conv4": ((192, 96, 3, 3), (1, 1), (1, 1, 1, 1), 2),
    "conv5": ((128, 96, 3, 3), (1, 1), (1, 1, 1, 1), 2),
}
MATRICES = {"fc6": (1024, 128 * 3 * 3), "fc7": (1024, 1024), "fc8": (10, 1024)}
NORM = (5, 1e-4, 0.75, 2.0, 2)  # section 3.3: size, alpha (divided by size, as in 2012), beta, k; towers
POOL = ((3, 3), (2, 2), (0, 0), True, "all")  # section 3.4: kernel, stride, zeros, round up; ties all count
DROPOUT = (0.5, 0, 1.0)  # section 4.2: p, first row, scale
# layers-145.cfg of 2012: (std, fan-in there, bias). std times sqrt(fan-in / ours) keeps the size of the outputs.
INIT = [(0.01, 363, 0.0), (0.01, 1200, 1.0), (0.03, 2304, 0.0), (0.03, 1728, 1.0), (0.03, 1728, 1.0)]
INIT += [(0.01, 9216, 1.0), (0.01, 4096, 1.0), (0.01, 4096, 0.0)]


def initial_weights(seed: int) -> Weights:
    """{name: (weight, bias)}: each weight drawn from (seed, its name)."""
    shapes = {name: layer[0] for name, layer in CONVOLUTIONS.items()} | MATRICES
    w = {}
    for (name, shape), (std, fan_in, bias) in zip(shapes.items(), INIT, strict=True):
        digest = hashlib.sha256(f"{seed}/{name}.weight".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        scale = std * (fan_in / torch.Size(shape[1:]).numel()) ** 0.5
        w[name] = (torch.empty(shape).normal_(0.0, scale, generator=generator), torch.full(shape[:1], bias))
    return w


def batches(store: Store, rows: Tensor, size: int, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels of an epoch: every image once, a random crop of it, mirrored or not (section 4.1)."""
    n, margin = len(rows), store.px - CROP
    order = torch.randperm(n, generator=stream(seed, epoch, "order"))
    corners = torch.randint(0, margin + 1, (n, 2), generator=stream(seed, epoch, "crop"))
    mirrored = torch.rand(n, generator=stream(seed, epoch, "flip")) < 0.5
    for batch in order.split(size):
        windows = zip(torch.tensor(store.images[rows[batch]]), corners[batch], strict=True)
        crops = torch.stack([image[top : top + CROP, left : left + CROP] for image, (top, left) in windows])
        crops = torch.where(mirrored[batch, None, None, None], crops.flip(2), crops)
        yield network_input(crops, store), torch.tensor(store.labels[rows[batch]]).long()


def network_input(crops: Tensor, store: Store) -> Tensor:
    """(N, c, c, 3) bytes -> (N, 3, c, c): less the middle of the mean image (section 2)."""
    return (crops.float() - torch.tensor(store.mean)[MIDDLE].float()).permute(0, 3, 1, 2)


def forward(w: Weights, x: Tensor, key: int | None) -> tuple[Tensor, list[Any]]:
    """Logits (N, classes), and the backward of each operation with its arguments. `key` draws the masks of dropout."""
    kept: list[Any] = []

    def keep(outputs: tuple[Any, ...], backward: Any, *constants: Any, weights: str = "") -> Tensor:
        kept.append((backward, (*outputs[1:], *constants), weights))
        return outputs[0]

    for name, (_, *window) in CONVOLUTIONS.items():
        x = keep(conv2d_forward(x, *w[name], *window), conv2d_backward, *window, weights=name)
        x = keep(relu_forward(x), relu_backward)
        if name in ("conv1", "conv2"):
            x = keep(local_response_norm_forward(x, *NORM), local_response_norm_backward, *NORM)
        if name in ("conv1", "conv2", "conv5"):
            x = keep(max_pool2d_forward(x, *POOL), max_pool2d_backward, x.shape[-2:], *POOL)
    x = keep((x.flatten(1),), Tensor.reshape, x.shape)
    for number, name in ((6, "fc6"), (7, "fc7")):
        x = keep(linear_forward(x, *w[name]), linear_backward, weights=name)
        x = keep(relu_forward(x), relu_backward)
        if key is None:
            x = x * 0.5  # in a test all units are there, and halved
        else:
            x = keep(dropout_forward(x, torch.tensor(key + number), *DROPOUT), dropout_backward, *DROPOUT)
    return keep(linear_forward(x, *w["fc8"]), linear_backward, weights="fc8"), kept


def backward(dy: Any, kept: list[Any]) -> Weights:
    """The chain rule, from the last operation to the first: {name: (dw, db)}."""
    g = {}
    for operation_backward, saved, name in reversed(kept):
        if name:
            dy, *g[name] = operation_backward(dy, *saved, (name != "conv1", True, True))  # needs dx, dw, db
        else:
            dy = operation_backward(dy, *saved)
    return g


def update(w: Weights, g: Weights, v: Weights, lr: float) -> None:
    """v <- 0.9 v - 0.0005 lr w - lr g;  w <- w + v (section 5). Biases are not decayed (2012 code)."""
    for name in w:
        for wi, gi, vi, decay in zip(w[name], g[name], v[name], (DECAY, 0.0), strict=True):
            vi.mul_(MOMENTUM).add_(wi, alpha=-decay * lr).add_(gi, alpha=-lr)
            wi.add_(vi)


def train(root: str, epochs: int = 5, size: int = 48, seed: int = 0) -> tuple[Weights, list[float]]:
    """Weights and the loss of every step. The rate rises for a quarter of training, then falls to zero."""
    store = open_store(Path(root) / "train")
    rows, holdout = (torch.from_numpy(part) for part in store.holdout())
    w, losses = initial_weights(seed), list[float]()
    v = {name: [torch.zeros_like(parameter) for parameter in layer] for name, layer in w.items()}
    steps = epochs * -(-len(rows) // size)
    for epoch in range(epochs):
        for x, labels in batches(store, rows, size, seed, epoch):
            logits, kept = forward(w, x, dropout_key(seed, len(losses), 0))
            loss, *saved = cross_entropy_forward(logits, labels, 0.0, "mean")
            dlogits = cross_entropy_backward(torch.ones(()), *saved, 0.0, "mean")  # type: ignore[call-arg, arg-type]
            done = len(losses) / steps
            lr = LR * (max(done / 0.25, 0.01) if done < 0.25 else 1 - (done - 0.25) / 0.75)
            update(w, backward(dlogits, kept), v, lr)
            losses.append(float(loss))
        logits, _ = forward(w, network_input(torch.tensor(store.images[holdout][MIDDLE]), store), key=None)
        wrong = logits.argmax(1) != torch.tensor(store.labels[holdout])
        print(f"epoch {epoch + 1}: loss {losses[-1]:.3f}, holdout error {100 * wrong.float().mean():.1f} %")
    return w, losses


if __name__ == "__main__":
    train(sys.argv[1])
