"""The one Function that binds any pair: differentiable once, in torch.func, on tensors without data."""

import pytest
import torch
from cases import normals, outcome
from torch.func import functional_call, grad, jacrev, vmap

from alexnet import layers
from alexnet.errors import UserError
from alexnet.layers.pair import Pair, apply_pair

X = normals(2, 4, 6, 6)
LOGITS, LABELS = normals(3, 4), torch.tensor([0, 3, 1])
CURVED = {
    "cross_entropy": lambda x: layers.cross_entropy(x.flatten(1)[:, :5], torch.tensor([0, 3])),
    "tanh": lambda x: layers.tanh(x).sum(),
    "local_response_norm": lambda x: layers.local_response_norm(x, 3, 0.3).sum(),
    "same_map_norm": lambda x: layers.same_map_norm(x, 3, 0.3).sum(),
    "relu_lrn_pool": lambda x: layers.relu_lrn_pool(x, 3, 0.3).sum(),
}


@pytest.mark.parametrize("operation", CURVED)
def test_a_second_derivative_is_an_error_where_dy_is_constant_too(operation):
    """A sum or a loss has a constant dy: autograd alone would take dx for a constant."""
    x = X.clone().requires_grad_()
    (dx,) = torch.autograd.grad(CURVED[operation](x), x, create_graph=True)
    (once,) = torch.autograd.grad(CURVED[operation](x), x)
    assert torch.equal(dx, once)
    with pytest.raises(UserError, match=r"second derivatives .* set backend=native"):
        dx.square().sum().backward()


def test_hessians_and_their_products_are_errors():
    def loss(x):
        return layers.cross_entropy(x, LABELS)

    for hessian in (
        lambda: torch.autograd.functional.hessian(loss, LOGITS),
        lambda: torch.autograd.functional.hvp(loss, LOGITS, LOGITS),
        lambda: jacrev(jacrev(loss))(LOGITS),
    ):
        with pytest.raises(UserError, match="second derivatives"):
            hessian()


def test_a_gradient_penalty_is_an_error():
    """WGAN-GP differentiates the norm of the input's gradient with respect to the weights."""
    critic = torch.nn.Sequential(layers.Linear(4, 3), layers.ReLU(), layers.Linear(3, 1)).double()
    x = LOGITS.clone().requires_grad_()
    (dx,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    with pytest.raises(UserError, match="second derivatives"):
        (dx.norm(dim=1) - 1).square().mean().backward()


NET = torch.nn.Sequential(
    layers.Conv2d(4, 6, 3, groups=2),
    layers.ReluLrnPool(3, 0.3, groups=2),
    torch.nn.Flatten(),
    layers.Dropout(),
    layers.Linear(24, 5),
    layers.Tanh(),
).double()


def loss_of(parameters, x, label):
    NET[3].eval()
    return layers.cross_entropy(functional_call(NET, parameters, (x[None],)), label[None])


def test_gradients_for_each_image_are_those_of_one_image_at_a_time():
    parameters, labels = dict(NET.named_parameters()), torch.tensor([1, 4])
    each = vmap(grad(loss_of), in_dims=(None, 0, 0))(parameters, X, labels)
    for i in range(2):
        alone = torch.autograd.grad(loss_of(parameters, X[i], labels[i]), parameters.values())
        torch.testing.assert_close([g[i] for g in each.values()], list(alone))


@pytest.mark.parametrize("operation", ["relu", "max_pool2d", "local_response_norm"])
def test_jacobians_and_batched_gradients_are_those_of_native(operation):
    def function(x, backend="reference"):
        arguments = {"max_pool2d": (3, 2), "local_response_norm": (3, 0.3)}.get(operation, ())
        return getattr(layers, operation)(x, *arguments, backend=backend)

    x = X[:1, :, :5, :5].clone().requires_grad_()
    expected = jacrev(lambda x: function(x, "native"))(x.detach())
    torch.testing.assert_close(jacrev(function)(x.detach()), expected)
    y = function(x)
    every_dy = torch.eye(y.numel(), dtype=x.dtype).view(y.numel(), *y.shape)
    (rows,) = torch.autograd.grad(y, x, every_dy, is_grads_batched=True)
    torch.testing.assert_close(rows.view(expected.shape), expected)


def test_a_pair_may_keep_any_tensor():
    """An operand, the output, another tensor or none: each comes back as it was."""

    def forward(x, factor):
        y = x.exp()
        return y, x, None, y, 2 * x

    def backward(dy, x, none, y, twice, factor):
        assert none is None
        torch.testing.assert_close(twice, 2 * x)
        return factor * dy * y

    def function(x):
        return apply_pair(Pair(forward, backward), (x,), (3.0,))

    _, [dx] = outcome(function, LOGITS)
    torch.testing.assert_close(dx, outcome(lambda x: 3 * x.exp(), LOGITS)[1][0])
    torch.testing.assert_close(vmap(grad(lambda x: function(x).sum()))(LOGITS), 3 * LOGITS.exp())


def test_a_tensor_without_data_has_a_shape():
    net = torch.nn.Sequential(*NET, layers.LocalResponseNorm(3)).to("meta")
    x = X.to("meta").requires_grad_()
    layers.cross_entropy(net.train()(x), torch.zeros(2, dtype=torch.long, device="meta")).backward()
    assert (x.grad.device.type, x.grad.shape) == ("meta", X.shape)


@pytest.mark.parametrize(
    "operation", ["relu", "tanh", "dropout", "max_pool2d", "local_response_norm", "same_map_norm"]
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_types_without_a_gradient_are_refused(operation, dtype):
    arguments = {"max_pool2d": (2,), "local_response_norm": (3,), "same_map_norm": (3,)}.get(operation, ())
    with pytest.raises(UserError, match=f"{operation}: .*{dtype} must have a real floating-point type"):
        getattr(layers, operation)(X.to(dtype), *arguments)


def test_operands_without_a_gradient_are_refused():
    for call in (
        lambda: layers.linear(LOGITS, torch.ones(2, 4).cfloat()),
        lambda: layers.conv2d(X, torch.ones(2, 4, 3, 3).cfloat()),
        lambda: layers.cross_entropy(LOGITS.long(), LABELS),
        lambda: layers.relu_lrn_pool(X.long(), 3),
    ):
        with pytest.raises(UserError, match="must have a real floating-point type"):
            call()
