"""Forward derivatives against finite differences: of networks, and through flow maps in every notation."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fluvial as fl
from fluvial import networks
from fluvial.distill.derivatives import along
from fluvial.flow_maps import FlowMap
from problems import normal

NOTATIONS = {
    "velocity": ("rectified", "velocity"),
    "vp": ("vp", "v"),
    "edm": ("edm", "edm"),
    "data": ("rectified", "data"),
    "cosine data": ("cosine", "data"),
}


def differences(function, point, direction, h):
    """The same by central differences of order 4, with step h."""

    def at(e):
        return function(*(p + e * d for p, d in zip(point, direction)))

    return (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)


def missed(got, expected):
    return float((got - expected).detach().norm() / expected.detach().norm())


def random_weights(network, seed=0, std=0.3):
    with torch.no_grad():
        for k, parameter in enumerate(network.parameters()):
            parameter.copy_(std * normal(*parameter.shape, seed=seed + k) / max(1, parameter[0].numel()) ** 0.5)
            if parameter.ndim == 1:
                parameter.add_(1.0 if k % 2 else 0.0)
    return network


def points(names=(), **options):
    """An MLP on points in the plane, with weights that make it bend."""
    made = networks.mlp(2, width=24, depth=2, **options).double()
    return random_weights(networks.told(made, names), std=1.0)


def images(names=()):
    """A U-Net with group norm on both levels and attention on the second, on images of 8x8 pixels."""
    made = networks.unet(2, 8, num_classes=3, width=8).double()
    return random_weights(networks.told(made, names), std=1.0)


class Attending(nn.Module):
    """Heads and lengths that a fused kernel takes, with group norm before, on images."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.norm, self.inner = nn.GroupNorm(2, 16), nn.Conv2d(2, 16, 1)
        self.qkv, self.outer = nn.Linear(16, 48), nn.Conv2d(16, 2, 1)
        self.to(dtype)

    def forward(self, x, t):
        hidden = self.norm(self.inner(x) + t.to(x.dtype)[:, None, None, None].sin())
        flat = hidden.flatten(2).transpose(1, 2)  # (B, HW, 16)
        q, k, v = self.qkv(flat).reshape(len(x), -1, 3, 2, 8).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.outer(mixed.transpose(1, 2).reshape(flat.shape).transpose(1, 2).reshape(hidden.shape))


def test_it_is_the_derivative_along_the_direction():
    """d/de of (x + e a)^3 t(e)^2, by hand; the point may be of any number of tensors."""
    x, a = normal(5, 3), normal(5, 3, seed=1)
    t, b = normal(5, seed=2), normal(5, seed=3)
    value, slope = along(lambda x, t: x**3 * t[:, None] ** 2, (x, t), (a, b))
    assert torch.equal(value, x**3 * t[:, None] ** 2)
    by_hand = 3 * x**2 * a * t[:, None] ** 2 + 2 * x**3 * t[:, None] * b[:, None]
    torch.testing.assert_close(slope, by_hand, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(along(torch.sin, (x,), (a,))[1], x.cos() * a, rtol=1e-15, atol=0)


@pytest.mark.parametrize(
    ("make", "shape", "layout"),
    [
        (points, (2,), torch.contiguous_format),
        (images, (2, 8, 8), torch.contiguous_format),
        (images, (2, 8, 8), torch.channels_last),
        (Attending, (2, 8, 8), torch.channels_last),
    ],
)
def test_networks_agree_with_finite_differences(make, shape, layout):
    network = make().eval().to(memory_format=layout)
    x, a = (normal(3, *shape, seed=k).contiguous(memory_format=layout) for k in (0, 1))
    point, direction = (x, torch.tensor([0.2, 0.5, 0.9]).double()), (a, torch.tensor([1.0, 2.0, -1.0]).double())
    value, slope = along(network, point, direction)
    torch.testing.assert_close(value, network(*point).detach(), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert missed(slope, differences(network, point, direction, 2e-5)) < 1e-8


@pytest.mark.parametrize("own", NOTATIONS)
@pytest.mark.parametrize("kind", ["average", "consistency"])
def test_flow_maps_agree_with_finite_differences(own, kind):
    """In x and t together, on both paths that losses are stated on, where each notation has its ends as well.

    VP knows no rectified time below 0.0066, EDM none outside 0.0123 … 0.998: beyond, its data estimate is kept.
    """
    path, prediction = NOTATIONS[own]
    network = points(["r"] if kind == "average" else []).eval()
    t = torch.tensor([1e-4, 3e-3, 0.05, 0.3, 0.5, 0.8, 0.97, 0.999, 1 - 1e-4], dtype=torch.float64)
    x, a = normal(len(t), 2), normal(len(t), 2, seed=1)
    r = torch.maximum(t, torch.tensor(0.9, dtype=torch.float64)) if kind == "average" else None
    for seen, name in (("rectified", "velocity"), ("cosine", "v")):
        flow_map = FlowMap(fl.convert(fl.Model(network, path, prediction), path=seen, prediction=name), kind)

        def answer(x, t, flow_map=flow_map, name=name):
            return flow_map.on_the_way(x, t, r).predict(fl.predictions.named(name))

        direction = (a, torch.ones_like(t))
        with torch.no_grad():
            value, slope = along(answer, (x, t), direction)
            torch.testing.assert_close(value, answer(x, t), rtol=1e-12, atol=1e-12)
            expected = differences(answer, (x, t), direction, 2e-6)
        for k in range(len(t)):
            assert missed(slope[k], expected[k]) < 1e-6, (seen, float(t[k]))


@pytest.mark.parametrize("own", NOTATIONS)
def test_no_clamp_nor_choice_makes_it_nan_near_the_ends(own):
    """Nearer to them than training times are drawn, beyond the range of every path that has one."""
    t = torch.tensor([1e-7, 1 - 1e-7], dtype=torch.float64)
    x, a = normal(2, 2), normal(2, 2, seed=1)
    for seen, name in (("rectified", "velocity"), ("cosine", "v")):
        flow_map = FlowMap(fl.convert(fl.Model(points(), *NOTATIONS[own]), path=seen, prediction=name))

        def answer(x, t, flow_map=flow_map, name=name):
            return flow_map.on_the_way(x, t).predict(fl.predictions.named(name))

        assert all(v.isfinite().all() for v in along(answer, (x, t), (a, torch.ones_like(t))))


def test_it_is_exact_under_autocast_and_without_gradients():
    """Half precision would lose a difference of derivatives; no_grad only says that nothing follows from it."""
    network = Attending(torch.float32).eval()
    point = normal(3, 2, 8, 8, dtype=torch.float32), torch.tensor([0.2, 0.5, 0.9])
    direction = normal(3, 2, 8, 8, seed=1, dtype=torch.float32), torch.ones(3)
    value, slope = along(network, point, direction)
    assert value.requires_grad
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        again = along(network, point, direction)
        half = network(*point)
    assert half.dtype == torch.bfloat16
    assert all(v.dtype == torch.float32 and not v.requires_grad for v in again)
    assert torch.equal(again[0], value)
    assert torch.equal(again[1], slope)
    point, direction = ([v.double() for v in some] for some in (point, direction))
    exact = along(copy.deepcopy(network).double(), tuple(point), tuple(direction))[1]
    assert missed(slope, exact) < 1e-5
