"""Working copies of master weights: the same update, a copy that is always its rounded master weight, exact resume."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from alexnet.optim import Krizhevsky
from alexnet.training.master_weights import FusedKrizhevsky, WorkingCopies

pytestmark = pytest.mark.filterwarnings("ignore")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))


def groups(network):
    return [
        {"params": list(network[i].parameters()), "lr": 0.1 * (i + 1), "weight_decay": 0.03} for i in (0, 2)
    ]


def step(optimizer, forward, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 6, generator=generator)
    optimizer.zero_grad()
    dtype = torch.bfloat16 if isinstance(forward, WorkingCopies) else torch.float32
    forward(x.to(dtype)).float().square().sum().backward()
    optimizer.step()


@pytest.mark.slow
@pytest.mark.parametrize("rate_inside", [True, False])
def test_without_copies_it_is_the_rule_of_optim(rate_inside):
    ours, reference = net(), net()
    fused = FusedKrizhevsky(groups(ours), rate_inside=rate_inside)
    plain = Krizhevsky(groups(reference), rate_inside=rate_inside)
    for i in range(3):
        for optimizer, network in ((fused, ours), (plain, reference)):
            optimizer.param_groups[0]["lr"] = 0.1 / (i + 1)
            step(optimizer, network, i)
    torch.testing.assert_close(ours.state_dict(), reference.state_dict())


def test_a_copy_is_its_master_weight_rounded_and_brings_the_gradient():
    network = net()
    before = deepcopy(network.state_dict())
    copies = WorkingCopies(network)
    optimizer = FusedKrizhevsky(groups(network), copies)
    step(optimizer, copies, 0)
    assert all(p.grad is None for p in network.parameters())
    for (name, master), copy in zip(network.named_parameters(), copies.by_name.values(), strict=True):
        assert not torch.equal(master, before[name])
        assert torch.equal(copy, master.bfloat16())
        assert master.dtype == torch.float32


@pytest.mark.parametrize("rate_inside", [True, False])
def test_the_gradient_of_a_copy_updates_its_master_weight_in_float32(rate_inside):
    """bfloat16 is what the gradient comes in, and nothing else of the update: 8 bits would show at rtol 1e-6."""
    network, reference = net(), net()
    copies = WorkingCopies(network)
    fused = FusedKrizhevsky(groups(network), copies, rate_inside=rate_inside)
    plain = Krizhevsky(groups(reference), rate_inside=rate_inside)
    for i in range(2):
        step(fused, copies, i)
        for p, copy in zip(reference.parameters(), copies.by_name.values(), strict=True):
            p.grad = copy.grad.float()
        plain.step()
    torch.testing.assert_close(network.state_dict(), reference.state_dict(), rtol=1e-6, atol=1e-7)


def test_a_new_rate_compiles_nothing_and_rate_zero_freezes():
    network = net()
    optimizer = FusedKrizhevsky(groups(network), WorkingCopies(network))
    copies = WorkingCopies(network)
    optimizer = FusedKrizhevsky(groups(network), copies)
    step(optimizer, copies, 0)
    graphs = counters["stats"]["unique_graphs"]
    optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["scale"] = 0.01, 0.0
    frozen = network[2].weight.clone()
    step(optimizer, copies, 1)
    assert counters["stats"]["unique_graphs"] == graphs
    assert torch.equal(network[2].weight, frozen)


def test_a_resumed_run_goes_on_bit_for_bit():
    network = net()
    copies = WorkingCopies(network)
    optimizer = FusedKrizhevsky(groups(network), copies)
    step(optimizer, copies, 0)
    weights, state = deepcopy(network.state_dict()), deepcopy(optimizer.state_dict())
    step(optimizer, copies, 1)

    resumed = net()
    resumed_copies = WorkingCopies(resumed)
    resumed.load_state_dict(weights)
    resumed_copies.refresh()
    resumed_optimizer = FusedKrizhevsky(groups(resumed), resumed_copies)
    resumed_optimizer.load_state_dict(state)
    step(resumed_optimizer, resumed_copies, 1)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), resumed.parameters(), strict=True))
