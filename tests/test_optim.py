import math

import pytest
import torch
from torch import nn

from alexnet.errors import UserError
from alexnet.optim import (
    Krizhevsky,
    OptimConfig,
    Rule,
    Schedule,
    build_optimizer,
    build_scheduler,
    conv1_scale,
    parameter_groups,
    rate_factor,
)


class Net(nn.Module):
    """Two layers with the names that the groups tell apart."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Linear(3, 2, dtype=torch.float64)
        self.fc8 = nn.Linear(2, 4, dtype=torch.float64)
        for i, w in enumerate(self.parameters()):
            w.data = gradient(i, w)


def gradient(step, w):
    return torch.randn(w.shape, generator=torch.Generator().manual_seed(100 + step), dtype=torch.float64)


def walk(net, optimizer, steps, lr=None, gradients=True):
    """So many steps with the same gradients for every net; the weights after each."""
    path = []
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] if lr is None else lr
        for w in net.parameters():
            w.grad = gradient(step, w) if gradients else torch.zeros_like(w)
        optimizer.step()
        path.append([w.detach().clone() for w in net.parameters()])
    return path


def assert_same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_is_the_formula_of_section_5():
    net = Net()
    optimizer = Krizhevsky(net.parameters(), lr=0.2, momentum=0.9, weight_decay=0.05)
    w = [w.detach().clone() for w in net.parameters()]
    v = [torch.zeros_like(x) for x in w]
    for step, rate in enumerate([0.2, 0.2, 0.2, 0.02, 0.02, 0.5]):
        (ours,) = walk(net, optimizer, [step], lr=rate)
        for i in range(len(w)):
            v[i] = 0.9 * v[i] - 0.05 * rate * w[i] - rate * gradient(step, w[i])
            w[i] = w[i] + v[i]
        assert_same(ours, w)


@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_is_torchs_sgd_while_the_rate_is_constant(decay):
    a, b = Net(), Net()
    ours = walk(a, Krizhevsky(a.parameters(), 0.2, 0.9, decay), range(10))
    theirs = walk(b, torch.optim.SGD(b.parameters(), 0.2, 0.9, weight_decay=decay), range(10))
    assert_same(ours, theirs)


def test_old_velocity_outlives_a_drop_of_the_rate():
    """v after the drop: 0.9 v, 0.81 v, ...: 9 v is still to come; torch rescales it by the drop to 0.9 v."""
    paths = []
    for rule in (Krizhevsky, torch.optim.SGD):
        net = Net()
        optimizer = rule(net.parameters(), 0.2, 0.9, weight_decay=0.0)
        before = walk(net, optimizer, range(5))
        paths.append((before, walk(net, optimizer, range(400), lr=0.02, gradients=False)))
    (before, after), (_, torchs) = paths
    v = before[-1][0] - before[-2][0]
    assert_same(after[0][0] - before[-1][0], 0.9 * v)
    torch.testing.assert_close(after[-1][0] - before[-1][0], 9 * v, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torchs[-1][0] - before[-1][0], 0.9 * v, rtol=1e-10, atol=1e-12)


def test_rate_outside_is_torchs_sgd_also_after_a_drop():
    a, b = Net(), Net()
    ours = Krizhevsky(a.parameters(), 0.2, 0.9, 0.05, rate_inside=False)
    theirs = torch.optim.SGD(b.parameters(), 0.2, 0.9, weight_decay=0.05)
    for rate in (0.2, 0.02):
        assert_same(walk(a, ours, range(4), lr=rate), walk(b, theirs, range(4), lr=rate))


def test_rule_is_chosen_by_the_configuration():
    assert build_optimizer(Net(), OptimConfig()).rate_inside
    assert not build_optimizer(Net(), OptimConfig(rule=Rule.sgd)).rate_inside


def test_biases_have_their_own_rate_and_no_decay():
    groups = {g["name"]: g for g in parameter_groups(Net(), OptimConfig(lr=0.1, bias_lr_mult=2.0))}
    assert {name: (g["lr"], g["weight_decay"]) for name, g in groups.items()} == {
        "conv1.weight": (0.1, 5e-4),
        "conv1.bias": (0.2, 0.0),
        "others.weight": (0.1, 5e-4),
        "others.bias": (0.2, 0.0),
    }
    decayed = parameter_groups(Net(), OptimConfig(bias_decay=True))
    assert {g["weight_decay"] for g in decayed} == {5e-4}


def test_every_parameter_is_in_one_group():
    net = Net()
    grouped = [id(p) for g in parameter_groups(net, OptimConfig()) for p in g["params"]]
    assert sorted(grouped) == sorted(id(p) for p in net.parameters())


def test_bias_without_gradient_does_not_move():
    net = Net()
    optimizer = build_optimizer(net, OptimConfig(weight_decay=0.5))
    before = [w.detach().clone() for w in net.parameters()]
    walk(net, optimizer, range(3), gradients=False)
    moved = [not torch.equal(w, old) for w, old in zip(net.parameters(), before, strict=True)]
    assert moved == [True, False, True, False]  # weights decay


@pytest.mark.parametrize("key", ["lr", "scale"])
def test_frozen_group_keeps_its_velocity_and_its_weights(key):
    net = Net()
    optimizer = build_optimizer(net, OptimConfig())
    walk(net, optimizer, range(2))
    conv1 = [g for g in optimizer.param_groups if g["name"].startswith("conv1.")]
    kept = {
        p: (p.detach().clone(), optimizer.state[p]["velocity"].clone()) for g in conv1 for p in g["params"]
    }
    thawed = [g[key] for g in conv1]
    for group in conv1:
        group[key] = 0.0
    fc8 = net.fc8.weight.detach().clone()
    walk(net, optimizer, range(2, 4))
    for p, (w, v) in kept.items():
        assert torch.equal(p, w)
        assert torch.equal(optimizer.state[p]["velocity"], v)
    assert not torch.equal(net.fc8.weight, fc8)
    for group, value in zip(conv1, thawed, strict=True):
        group[key] = value
    walk(net, optimizer, [4])
    assert all(not torch.equal(p, w) for p, (w, _) in kept.items())


def test_a_parameter_without_gradient_is_left_alone():
    net = Net()
    optimizer = build_optimizer(net, OptimConfig())
    net.conv1.weight.grad = torch.ones_like(net.conv1.weight)
    before = net.fc8.weight.detach().clone()
    optimizer.step()
    assert torch.equal(net.fc8.weight, before)


def test_closure_is_called_with_gradients():
    net = Net()
    optimizer = build_optimizer(net, OptimConfig())
    x = torch.ones(1, 3, dtype=torch.float64)

    def closure():
        optimizer.zero_grad()
        loss = net.fc8(net.conv1(x)).square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first


def test_state_survives_saving():
    whole, parts = Net(), Net()
    expected = walk(whole, build_optimizer(whole, OptimConfig()), range(6))[-1]
    first = build_optimizer(parts, OptimConfig())
    walk(parts, first, range(3))
    second = build_optimizer(parts, OptimConfig())
    second.load_state_dict(first.state_dict())
    assert_same(walk(parts, second, range(3, 6))[-1], expected)


def rates(config, steps):
    """The rate of each group at each step."""
    optimizer = build_optimizer(Net(), config)
    scheduler = build_scheduler(optimizer, config, steps)
    seen = []
    for _ in range(steps):
        seen.append({g["name"]: g["lr"] for g in optimizer.param_groups})
        optimizer.step()
        scheduler.step()
    return seen


def test_steps_divide_by_ten_and_may_leave_the_biases():
    config = OptimConfig(
        lr=1.0, schedule=Schedule.steps, milestones=[0.2, 0.6], bias_lr_mult=2.0, bias_anneals=False
    )
    seen = rates(config, 10)
    assert [round(r["others.weight"], 6) for r in seen] == [1, 1, 0.1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.01]
    assert {r["others.bias"] for r in seen} == {2.0}


def test_cosine_and_one_cycle_rise_and_end_at_zero():
    for schedule, middle in (
        (Schedule.cosine, 0.5 * (1 + math.cos(math.pi * 0.5))),
        (Schedule.one_cycle, 0.5),
    ):
        config = OptimConfig(schedule=schedule, warmup=0.2)
        assert rate_factor(config, 0.1) == pytest.approx(0.5)
        assert rate_factor(config, 0.2) == pytest.approx(1)
        assert rate_factor(config, 0.6) == pytest.approx(middle)
        assert rate_factor(config, 1.0) == pytest.approx(0)


def test_a_schedule_that_progress_alone_does_not_decide_has_no_factor():
    with pytest.raises(UserError, match=r"optim.schedule=plateau has no rate"):
        rate_factor(OptimConfig(schedule="plateau"), 0.5)


def test_plateau_drops_three_times_and_never_the_biases_that_do_not_anneal():
    config = OptimConfig(lr=1.0, patience=0, bias_anneals=False)
    optimizer = build_optimizer(Net(), config)
    scheduler = build_scheduler(optimizer, config, 0)
    for _ in range(8):
        scheduler.step(0.5)
    found = {g["name"]: g["lr"] for g in optimizer.param_groups}
    assert found["others.weight"] == pytest.approx(1e-3)
    assert found["others.bias"] == 1.0


def test_conv1_is_slowed_then_frozen():
    config = OptimConfig(conv1_slow_at=0.7, conv1_frozen_at=0.8)
    assert [conv1_scale(config, p) for p in (0, 0.69, 0.7, 0.79, 0.8, 1)] == [1, 1, 0.1, 0.1, 0, 0]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", 0.0),
        ("epochs", 0),
        ("bias_lr_mult", -1.0),
        ("momentum", 1.0),
        ("warmup", 1.0),
        ("weight_decay", -1e-4),
        ("patience", -1),
        ("drops", -1),
        ("conv1_slow_at", -3.0),
    ],
)
def test_impossible_values_are_refused(key, value):
    with pytest.raises(UserError, match=f"optim.{key}={value}"):
        OptimConfig(**{key: value})


def test_milestones_are_fractions_of_training():
    with pytest.raises(UserError, match=r"optim.milestones=\[2.0, 3.0\] must be in \[0, 1\]"):
        OptimConfig(milestones=[2.0, 3.0])
