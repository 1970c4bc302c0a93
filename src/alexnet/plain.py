"""The whole job in one sitting: images, network, loss, every gradient, the update of 2012, the error. No autograd.

    python -m alexnet.plain data/synthetic

trains the quickstart's network (`mini` at half width, crops of 56 pixels) on a prepared store, step for step with the
bits of scripts/train.py on a CPU. What the trainer adds (configuration, checkpoints, fast backends, GPUs) changes how
the job is run, not what is computed.

Every x_forward and x_backward is derived in the file of its layer. They are plain functions of tensors: x_forward
returns its output and what x_backward needs of it; x_backward takes the gradient of the loss with respect to that
output, dy, and returns the gradients with respect to the inputs.

Shapes: N images, C maps of H x W pixels (N, C, H, W); kernels (O, C/towers, R, S); matrices (O, I).
"""

import hashlib
import sys
from collections.abc import Iterator
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

CROP, LR, MOMENTUM, DECAY = 56, 0.01, 0.9, 5e-4  # pixels of a stored image's 64; section 5
# (O, C/towers, R, S), stride, zeros (left, right, top, bottom), towers.
CONVOLUTIONS: dict[str, Any] = {
    "conv1": ((48, 3, 7, 7), (2, 2), (1, 2, 1, 2), 1),
    "conv2": ((128, 24, 5, 5), (1, 1), (2, 2, 2, 2), 2),
    "conv3": ((192, 128, 3, 3), (1, 1), (1, 1, 1, 1), 1),
    "conv4": ((192, 96, 3, 3), (1, 1), (1, 1, 1, 1), 2),
    "conv5": ((128, 96, 3, 3), (1, 1), (1, 1, 1, 1), 2),
}
MATRICES = {"fc6": (1024, 128 * 3 * 3), "fc7": (1024, 1024), "fc8": (10, 1024)}
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
DROPOUT = (0.5, 0, 1.0)  # p, first row, scale (section 4.2)
# Of the 2012 net (layers-145.cfg). std times sqrt(fan-in / ours) keeps the size of the outputs.
INIT_STD = (0.01, 0.01, 0.03, 0.03, 0.03, 0.01, 0.01, 0.01)
INIT_FAN_IN = (363, 1200, 2304, 1728, 1728, 9216, 4096, 4096)
INIT_BIAS = (0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0)


def initial_weights(seed: int) -> dict[str, Tensor]:
    """{name.weight, name.bias}: each weight drawn from (seed, its name)."""
    shapes = {name: layer[0] for name, layer in CONVOLUTIONS.items()} | MATRICES
    w: dict[str, Tensor] = {}
    for (name, shape), std, fan_in, bias in zip(
        shapes.items(), INIT_STD, INIT_FAN_IN, INIT_BIAS, strict=True
    ):
        digest = hashlib.sha256(f"{seed}/{name}.weight".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        weight = torch.empty(shape)
        weight.normal_(0.0, std * (fan_in / weight[0].numel()) ** 0.5, generator=generator)
        w |= {f"{name}.weight": weight, f"{name}.bias": torch.full(shape[:1], bias)}
    return w


def batches(store: Store, rows: Tensor, size: int, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels of an epoch: every image once, a random crop of it, mirrored or not (section 4.1)."""
    n, margin = len(rows), store.px - CROP
    order = torch.randperm(n, generator=stream(seed, epoch, "order"))
    corners = torch.randint(0, margin + 1, (n, 2), generator=stream(seed, epoch, "crop"))
    mirrored = torch.rand(n, generator=stream(seed, epoch, "flip")) < 0.5
    for batch in order.split(size):
        crops = []
        for i in batch.tolist():
            top, left = corners[i].tolist()
            crop = torch.tensor(store.images[rows[i], top : top + CROP, left : left + CROP])
            crops.append(crop.flip(1) if mirrored[i] else crop)
        yield network_input(torch.stack(crops), store), torch.tensor(store.labels[rows[batch]]).long()


def network_input(crops: Tensor, store: Store) -> Tensor:
    """(N, c, c, 3) bytes -> (N, 3, c, c): less the middle of the mean image (section 2)."""
    return (crops.float() - torch.tensor(middle(store.mean)).float()).permute(0, 3, 1, 2)


def middle(images: Any) -> Any:
    """(..., px, px, 3) -> the crop in the middle."""
    start = (images.shape[-2] - CROP) // 2
    return images[..., start : start + CROP, start : start + CROP, :]


def forward(w: dict[str, Tensor], x: Tensor, key: int | None) -> tuple[Tensor, list[tuple[str, Any]]]:
    """Logits (N, classes), and what each operation's backward needs. `key` names the dropout masks; None: a test."""
    kept: list[tuple[str, Any]] = []

    def keep(name: str, outputs: tuple[Any, ...], *constants: Any) -> Tensor:
        kept.append((name, (*outputs[1:], *constants)))
        return outputs[0]

    for name, (_, *window) in CONVOLUTIONS.items():
        x = keep(name, conv2d_forward(x, w[f"{name}.weight"], w[f"{name}.bias"], *window), *window)
        x = keep("relu", relu_forward(x))
        if name in ("conv1", "conv2"):
            x = keep("norm", local_response_norm_forward(x, *NORM), *NORM)
        if name in ("conv1", "conv2", "conv5"):
            x = keep("pool", max_pool2d_forward(x, *POOL), x.shape[-2:], *POOL)
    x = keep("flatten", (x.flatten(1),), x.shape)
    for number, name in ((6, "fc6"), (7, "fc7")):
        x = keep(name, linear_forward(x, w[f"{name}.weight"], w[f"{name}.bias"]))
        x = keep("relu", relu_forward(x))
        if key is None:
            x = x * 0.5  # in a test all units are there, and halved
        else:
            x = keep("dropout", dropout_forward(x, torch.tensor(key + number), *DROPOUT), *DROPOUT)
    return keep("fc8", linear_forward(x, w["fc8.weight"], w["fc8.bias"])), kept


def backward(dy: Any, kept: list[tuple[str, Any]]) -> dict[str, Any]:
    """The chain rule, from the last operation to the first: the gradients by the names of the weights."""
    g: dict[str, Any] = {}
    small: dict[str, Any] = {
        "relu": relu_backward,
        "norm": local_response_norm_backward,
        "pool": max_pool2d_backward,
        "dropout": dropout_backward,
        "flatten": Tensor.reshape,
    }
    for name, saved in reversed(kept):
        if name in small:
            dy = small[name](dy, *saved)
        else:
            needs = (name != "conv1", True, True)  # of dx, dw, db
            weighted: Any = conv2d_backward if name in CONVOLUTIONS else linear_backward
            dy, g[f"{name}.weight"], g[f"{name}.bias"] = weighted(dy, *saved, needs)
    return g


def update(w: dict[str, Tensor], g: dict[str, Tensor], v: dict[str, Tensor], lr: float) -> None:
    """v <- 0.9 v - 0.0005 lr w - lr g;  w <- w + v (section 5). Biases are not decayed (2012 code)."""
    for name in w:
        v[name].mul_(MOMENTUM)
        if name.endswith("weight"):
            v[name].add_(w[name], alpha=-DECAY * lr)
        w[name].add_(v[name].add_(g[name], alpha=-lr))


def train(root: str, epochs: int = 5, size: int = 48, seed: int = 0) -> tuple[dict[str, Tensor], list[float]]:
    """Weights, and the loss of every step. The rate rises for a quarter of training and falls to zero in the rest."""
    store = open_store(Path(root) / "train")
    rows, holdout = (torch.from_numpy(part) for part in store.holdout())
    w, losses = initial_weights(seed), list[float]()
    v = {name: torch.zeros_like(weight) for name, weight in w.items()}
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
        logits, _ = forward(w, network_input(torch.tensor(middle(store.images[holdout])), store), key=None)
        wrong = logits.argmax(1) != torch.tensor(store.labels[holdout])
        print(f"epoch {epoch + 1}: loss {losses[-1]:.3f}, holdout error {100 * wrong.float().mean():.1f} %")
    return w, losses


if __name__ == "__main__":
    train(sys.argv[1])
