"""One image through a network of two layers by hand: every number of the page's last chapter.

A 3 x 3 image, one 2 x 2 kernel, a ReLU, a fully connected layer of 2 outputs, softmax and cross-entropy; then one
update, and the loss after it. The inputs are typed here; all else is computed by the layers' own pairs. The sentences
stand in mathematics.html.
"""

import torch
from torch import Tensor

from alexnet import layers
from alexnet.layers.pair import PAIRS
from alexnet.optim import krizhevsky_update

RATE, MOMENTUM, DECAY = 0.1, 0.9, 0.0005
TARGET = torch.tensor([1])
GEOMETRY = ((1, 1), (0, 0, 0, 0), 1)  # stride 1, no padding, one group
ALL = (True, True, True)
IMAGE = torch.tensor([[[[1.0, 0.0, 2.0], [0.0, 1.0, 0.0], [2.0, 0.0, 1.0]]]], dtype=torch.float64)
WEIGHTS = {
    "w1": [[[[1.0, -1.0], [0.0, 1.0]]]],
    "b1": [0.0],
    "w2": [[0.5, 0.0, -0.5, 1.0], [0.0, 0.5, 0.5, -0.5]],
    "b2": [0.0, 0.5],
}


def walk() -> tuple[list[dict[str, Tensor]], list[tuple[str, Tensor, Tensor]]]:
    """The named numbers of each step, and (name, by hand, by autograd) for the loss and every gradient."""
    conv, relu, linear, loss = (
        PAIRS[name, "reference"] for name in ("conv2d", "relu", "linear", "cross_entropy")
    )
    w = {name: torch.tensor(value, dtype=torch.float64) for name, value in WEIGHTS.items()}
    y1, *kept1 = conv.forward(IMAGE, w["w1"], w["b1"], *GEOMETRY)
    a1, *kept_relu = relu.forward(y1)
    z, *kept2 = linear.forward(a1.flatten(1), w["w2"], w["b2"])
    L, *kept_loss = loss.forward(z, TARGET, 0.0, "mean")
    p = z.softmax(1)

    dz = loss.backward(torch.ones_like(L), *kept_loss, 0.0, "mean")
    da1, dw2, db2 = linear.backward(dz, *kept2, ALL)
    dy1 = relu.backward(da1.reshape(a1.shape), *kept_relu)
    dx, dw1, db1 = conv.backward(dy1, *kept1, *GEOMETRY, ALL)

    moved = {name: value.clone() for name, value in w.items()}
    velocity = [torch.zeros_like(value) for value in w.values()]
    krizhevsky_update(list(moved.values()), [dw1, db1, dw2, db2], velocity, RATE, MOMENTUM, DECAY)
    steps = [
        {"x": IMAGE[0, 0], "w_1": w["w1"][0, 0], "b_1": w["b1"], "W_2": w["w2"], "b_2": w["b2"]},
        {"y": y1[0, 0]},
        {"a": a1[0, 0]},
        {"z": z[0]},
        {"p": p[0], "L": L},
        {"dz": dz[0]},
        {"dW_2": dw2, "db_2": db2, "da": da1.reshape(2, 2)},
        {"dy": dy1[0, 0]},
        {"dw_1": dw1[0, 0], "db_1": db1},
        {"dx": dx[0, 0]},
        {"w_1": moved["w1"][0, 0], "b_1": moved["b1"], "W_2": moved["w2"], "b_2": moved["b2"]},
        {"L": _loss(IMAGE, moved, "reference")},
    ]

    # The same by torch's own functions, differentiated by torch.
    leaves = {name: value.clone().requires_grad_() for name, value in w.items()}
    image = IMAGE.clone().requires_grad_()
    exact = _loss(image, leaves, "native")
    *theirs, image_grad = torch.autograd.grad(exact, [*leaves.values(), image])
    gradients = zip(("dw1", "db1", "dw2", "db2"), (dw1, db1, dw2, db2), theirs, strict=True)
    return steps, [("L", L, exact.detach()), *gradients, ("dx", dx, image_grad)]


def _loss(x: Tensor, w: dict[str, Tensor], backend: str) -> Tensor:
    y1 = layers.conv2d(x, w["w1"], w["b1"], backend=backend)
    z = layers.linear(layers.relu(y1, backend=backend).flatten(1), w["w2"], w["b2"], backend=backend)
    return layers.cross_entropy(z, TARGET, backend=backend)
