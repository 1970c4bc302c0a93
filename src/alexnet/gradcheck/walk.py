"""One image through a network of two layers by hand: every number of the page's last chapter.

A 3 x 3 image, one 2 x 2 kernel, a ReLU, a fully connected layer of 2 outputs, softmax and cross-entropy; then one
update, and the loss after it. The inputs are typed here; all else is computed by the layers' own pairs.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from alexnet import layers
from alexnet.layers.pair import PAIRS
from alexnet.optim import krizhevsky_update

RATE, MOMENTUM, DECAY = 0.1, 0.9, 0.0005
TARGET = torch.tensor([1])
GEOMETRY = ((1, 1), (0, 0, 0, 0), 1)  # stride 1, no padding, one group
ALL = (True, True, True)


class Step(NamedTuple):
    """A sentence, a formula, and the named numbers that it gives."""

    sentence: str
    formula: str
    numbers: dict[str, Tensor]


def weights() -> dict[str, Tensor]:
    """w1 (1, 1, 2, 2), b1 (1), w2 (2, 4), b2 (2), in float64."""
    numbers = {
        "w1": [[[[1.0, -1.0], [0.0, 1.0]]]],
        "b1": [0.0],
        "w2": [[0.5, 0.0, -0.5, 1.0], [0.0, 0.5, 0.5, -0.5]],
        "b2": [0.0, 0.5],
    }
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}


IMAGE = torch.tensor([[[[1.0, 0.0, 2.0], [0.0, 1.0, 0.0], [2.0, 0.0, 1.0]]]], dtype=torch.float64)


def walk() -> tuple[list[Step], list[tuple[str, Tensor, Tensor]]]:
    """The steps, and (name, by hand, by autograd) for the loss and every gradient."""
    conv, relu, linear, loss = (
        PAIRS[name, "reference"] for name in ("conv2d", "relu", "linear", "cross_entropy")
    )
    w = weights()
    y1, *kept1 = conv.forward(IMAGE, w["w1"], w["b1"], *GEOMETRY)
    a1, *kept_relu = relu.forward(y1)
    z, *kept2 = linear.forward(a1.flatten(1), w["w2"], w["b2"])
    L, *kept_loss = loss.forward(z, TARGET, 0.0, "mean")
    p = z.softmax(1)

    dz = loss.backward(torch.ones_like(L), *kept_loss, 0.0, "mean")
    da1, dw2, db2 = linear.backward(dz, *kept2, ALL)
    dy1 = relu.backward(da1.reshape(a1.shape), *kept_relu)
    dx, dw1, db1 = conv.backward(dy1, *kept1, *GEOMETRY, ALL)
    gradients = {"w1": dw1, "b1": db1, "w2": dw2, "b2": db2}

    moved, velocity = {n: x.clone() for n, x in w.items()}, {n: torch.zeros_like(x) for n, x in w.items()}
    w_list, g_list, v_list = (list(each.values()) for each in (moved, gradients, velocity))
    krizhevsky_update(w_list, g_list, v_list, RATE, MOMENTUM, DECAY)
    steps = [
        Step("The image, and the weights to begin with; the true class is 1.", r"x, w_1, b_1, W_2, b_2",
             {"x": IMAGE[0, 0], "w_1": w["w1"][0, 0], "b_1": w["b1"], "W_2": w["w2"], "b_2": w["b2"]}),
        Step("Forward: the kernel is multiplied with each of the four windows.",
             r"y_{pq} = b_1 + \sum_{r,s} w_{rs} x_{p+r,\,q+s}", {"y": y1[0, 0]}),
        Step("The ReLU closes what is negative.", r"a = \max(y, 0)", {"a": a1[0, 0]}),
        Step("The four numbers in reading order are the input of the second layer.", r"z = W_2 a + b_2", {"z": z[0]}),
        Step("Softmax: two probabilities, and the loss in nats.", r"p_k = e^{z_k} / \sum_j e^{z_j}, \; L = -\log p_1",
             {"p": p[0], "L": L}),
        Step("Backward begins: what the network says minus what is true.", r"dz = p - q", {"dz": dz[0]}),
        Step("The second layer: an outer product, a copy, and the product with the transpose.",
             r"dW_2 = dz\, a^{\top}, \quad db_2 = dz, \quad da = W_2^{\top} dz",
             {"dW_2": dw2, "db_2": db2, "da": da1.reshape(2, 2)}),
        Step("The ReLU lets the gradient of open units through.", r"dy = da\,[y > 0]", {"dy": dy1[0, 0]}),
        Step("The first layer: each weight met four windows, and adds what each gives.",
             r"dw_{rs} = \sum_{p,q} dy_{pq}\, x_{p+r,\,q+s}, \quad db_1 = \sum_{p,q} dy_{pq}",
             {"dw_1": dw1[0, 0], "db_1": db1}),
        Step("The image's own gradient, which training does not need: fold.",
             r"dx_{ij} = \sum_{p+r=i,\,q+s=j} dy_{pq}\, w_{rs}", {"dx": dx[0, 0]}),
        Step(f"One update of every weight: rate {RATE}, momentum {MOMENTUM}, decay {DECAY}, velocity 0 before.",
             r"v \leftarrow 0.9\,v - 0.0005\,\epsilon\,w - \epsilon\,g, \quad w \leftarrow w + v",
             {"w_1": moved["w1"][0, 0], "b_1": moved["b1"], "W_2": moved["w2"], "b_2": moved["b2"]}),
        Step("The loss after it.", r"L", {"L": loss_at(moved, "reference")}),
    ]  # fmt: skip
    return steps, _compared({"L": L, **{f"d{n}": g for n, g in gradients.items()}, "dx": dx})


def loss_at(w: dict[str, Tensor], backend: str, x: Tensor = IMAGE) -> Tensor:
    """The loss of the network at given weights."""
    y1 = layers.conv2d(x, w["w1"], w["b1"], backend=backend)
    z = layers.linear(layers.relu(y1, backend=backend).flatten(1), w["w2"], w["b2"], backend=backend)
    return layers.cross_entropy(z, TARGET, backend=backend)


def _compared(ours: dict[str, Tensor]) -> list[tuple[str, Tensor, Tensor]]:
    """The same by torch's own functions, differentiated by torch."""
    leaves = {name: value.requires_grad_() for name, value in {**weights(), "x": IMAGE.clone()}.items()}
    x = leaves["x"]
    L = loss_at({name: leaf for name, leaf in leaves.items() if name != "x"}, "native", x)
    L.backward()
    theirs = {"L": L.detach(), **{f"d{name}": leaf.grad for name, leaf in leaves.items()}}
    return [(name, value, theirs[name]) for name, value in ours.items()]  # type: ignore[misc]
