"""Grad-CAM: networks whose map is known, derivatives by finite differences, and a model left as it was found."""
import numpy as np
import pytest
import torch
from torch import nn

from attnnas.networks.registry import create_model
from attnnas.core.errors import AttnnasError
from attnnas.explain.gradcam import gradcam
from attnnas.visual.networks import VISUAL_MODELS, visual_model

SIZES = {"image": (6, 5), "clip": (3, 6, 5)}
each_size = pytest.mark.parametrize("size", SIZES.values(), ids=list(SIZES))


def randn(*shape, seed=0): return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pointwise(size, ins, outs): return (nn.Conv2d if len(size) == 2 else nn.Conv3d)(ins, outs, 1, dtype=torch.float64)


def pooled(size): return nn.AdaptiveAvgPool2d(1) if len(size) == 2 else nn.AdaptiveAvgPool3d(1)


def linear(size, classes=4, *between):
    "A layer, average pooling, a linear classifier: the map is ReLU(sum_k V_ck A_k) / P."
    torch.manual_seed(0)
    return nn.Sequential(pointwise(size, 3, 5), *between, pooled(size), nn.Flatten(), nn.Linear(5, classes, dtype=torch.float64))


def known(network, x, classes):
    "The closed form, one image and one class after the other, in NumPy."
    A, V = network[0](x).detach().numpy(), network[-1].weight.detach().numpy()
    maps = [[np.maximum(sum(V[c, k] * A[n, k] for k in range(5)), 0) / A[0, 0].size for c in row] for n, row in enumerate(classes)]
    return torch.tensor(np.array(maps))


@each_size
@pytest.mark.parametrize("classes, rows", [(2, [[2]] * 3), ([0, 3, 1], [[0], [3], [1]]), (torch.tensor([0, 3, 1]), [[0], [3], [1]]),
                                           ([[0, 1], [2, 3], [3, 3]], [[0, 1], [2, 3], [3, 3]])], ids=["one", "list", "tensor", "several"])
def test_a_linear_network_s_map_is_known(size, classes, rows):
    network, x = linear(size), randn(3, 3, *size)
    maps = gradcam(network, x, "0", classes)
    torch.testing.assert_close(maps, known(network, x, rows), atol=1e-12, rtol=1e-12)
    assert maps.shape == (3, len(rows[0]), *size) and (maps >= 0).all()


@each_size
def test_without_classes_it_is_the_highest_score_of_each_image(size):
    network, x = linear(size), randn(6, 3, *size) + 3 * randn(6, 3, *(1 for _ in size), seed=1)
    best = network(x).argmax(1)
    assert len(best.unique()) > 1
    torch.testing.assert_close(gradcam(network, x, "0"), known(network, x, best[:, None].tolist()))


@each_size
def test_a_curved_network_by_finite_differences(size):
    "Each derivative by a central difference of the score, one activation after the other."
    torch.manual_seed(1)
    rest = nn.Sequential(pointwise(size, 4, 6), nn.Tanh(), pooled(size), nn.Flatten(), nn.Linear(6, 3, dtype=torch.float64))
    network, x = nn.Sequential(pointwise(size, 3, 4), rest), randn(1, 3, *size)
    with torch.no_grad():
        A, step = network[0](x), 1e-5
        slopes = np.zeros(A.shape)
        for place in np.ndindex(*A.shape):
            up, down = A.clone(), A.clone()
            up[place] += step
            down[place] -= step
            slopes[place] = (rest(up)[0, 1] - rest(down)[0, 1]).item() / (2 * step)
    expected = np.maximum(sum(slopes[0, k].mean() * A[0, k].numpy() for k in range(4)), 0)
    torch.testing.assert_close(gradcam(network, x, "0", 1)[0, 0], torch.tensor(expected), atol=1e-9, rtol=1e-7)


# ---- scores, not probabilities

def test_a_model_of_probabilities_is_refused():
    network, x = linear((6, 5)), randn(2, 3, 6, 5)
    with pytest.raises(AttnnasError, match="scores before the softmax"): gradcam(nn.Sequential(network, nn.Softmax(1)), x, "0.0", 1)


def test_the_map_is_that_of_the_score():
    "If this fails, probabilities are differentiated: their map does not scale with the scores, and dies where they are sure."
    network, x = linear((6, 5)), randn(2, 3, 6, 5)
    before = gradcam(network, x, "0", 1)
    with torch.no_grad(): network[-1].weight.mul_(1e4)
    torch.testing.assert_close(gradcam(network, x, "0", 1), 1e4 * before)


def test_nothing_in_favour_gives_zeros():
    network, x = linear((6, 5)), randn(2, 3, 6, 5)
    with torch.no_grad(): network[0].weight.abs_(), network[0].bias.zero_(), network[-1].weight.abs_().neg_()
    assert gradcam(network, x.abs(), "0", 1).equal(torch.zeros(2, 1, 6, 5, dtype=torch.float64))


# ---- any layer, in one pass

def test_an_activation_is_caught_before_it_is_changed_in_place():
    network, x = linear((6, 5), 4, nn.ReLU(inplace=True)), randn(2, 3, 6, 5)
    A = network[0](x).detach()
    slope = network[-1].weight[1].detach()[None, :, None, None] * (A > 0) / 30
    expected = (slope.mean((2, 3), keepdim=True) * A).sum(1, keepdim=True).relu()
    torch.testing.assert_close(gradcam(network, x, "0", 1), expected)
    assert (A < 0).any()


def test_several_layers_from_one_pass():
    network, x, calls = linear((6, 5), 4, nn.Tanh()), randn(2, 3, 6, 5), []
    network.register_forward_hook(lambda *args: calls.append(1))
    maps = gradcam(network, x, ["1", "0"], [1, 2])
    assert list(maps) == ["1", "0"] and len(calls) == 1
    for name, value in maps.items(): torch.testing.assert_close(value, gradcam(network, x, name, [1, 2]))


@pytest.mark.parametrize("name", VISUAL_MODELS)
def test_every_row_of_the_poster_at_its_three_stages(name):
    torch.manual_seed(0)
    model, x = visual_model(name, 3, width=0.35, dtype=torch.float64).eval(), randn(3, 3, 64, 64)
    maps = gradcam(model, x, model.layers.values(), [0, 1, 2])
    assert [tuple(m.shape) for m in maps.values()] == [(3, 1, s, s) for s in ((8, 4, 2) if "l2pa" in name or "gated" in name else (16, 8, 4))]
    for layer, value in maps.items():                               # an image's map does not depend on its company
        torch.testing.assert_close(value[1:2], gradcam(model, x[1:2], layer, 1))
    assert any((value > 0).any() for value in maps.values())


def test_a_video_network_gives_a_map_a_frame():
    torch.manual_seed(0)
    model, clip = create_model("i3d_small", 5), torch.randn(2, 3, 8, 24, 24)
    value = gradcam(model, clip, "Mixed_4b")
    assert value.shape[:3] == (2, 1, 8) and value.ndim == 5
    assert (value.amax((1, 3, 4)) != value.amax((1, 3, 4))[:, :1]).any(), "frames have maps of their own"


# ---- left as it was found

class Fails(nn.Module):
    def forward(self, x): raise KeyError("inside the model")


def state(model):
    return ({n: v.clone() for n, v in model.state_dict().items()}, [m.training for m in model.modules()],
            [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
            [None if p.grad is None else p.grad.clone() for p in model.parameters()], [p.requires_grad for p in model.parameters()])


def same(one, other):
    return (one[1:3], one[4]) == (other[1:3], other[4]) and all(one[0][n].equal(v) for n, v in other[0].items()) \
        and all(a is b is None or a.equal(b) for a, b in zip(one[3], other[3]))


def mixed():
    "Some parts training, some not, some frozen, some with gradients, and a batch norm and a dropout that would show."
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Sequential(nn.Dropout(0.9), nn.ReLU()), nn.AdaptiveAvgPool2d(1),
                          nn.Flatten(), nn.Linear(6, 4)).double().train()
    model[2][1].eval(), model[0].requires_grad_(False)
    model(randn(4, 3, 9, 9)).sum().backward()
    model[0].register_forward_hook(lambda *args: None)
    return model


def test_hooks_mode_and_gradients_are_as_before():
    model, x = mixed(), randn(2, 3, 9, 9)
    before = state(model)
    first, second = gradcam(model, x, ["0", "2"]), gradcam(model, x, ["0", "2"])
    assert same(before, state(model)) and not x.requires_grad
    assert all(first[n].equal(second[n]) and not first[n].requires_grad for n in first), "evaluation mode: no dropout"


@pytest.mark.parametrize("wrong, error", [
    (dict(fails=True), KeyError), (dict(layers=["0", "5"]), AttnnasError), (dict(layers="9"), AttnnasError), (dict(classes=4), AttnnasError),
    (dict(classes=[0]), AttnnasError), (dict(classes=[[0.5], [1.0]]), AttnnasError), (dict(x=randn(2, 5, 9, 9)), RuntimeError)])
def test_also_after_an_exception(wrong, error):
    model = mixed()
    if wrong.pop("fails", False): model.append(Fails())
    before = state(model)
    with pytest.raises(error): gradcam(**dict(model=model, x=randn(2, 3, 9, 9), layers="0", classes=1) | wrong)
    assert same(before, state(model))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_where_gradients_are_switched_off_and_the_network_is_frozen(context):
    network, x = linear((6, 5)).requires_grad_(False), randn(2, 3, 6, 5)
    with context(): maps = gradcam(network, x.clone(), "0", 1)
    torch.testing.assert_close(maps, known(network, x, [[1], [1]]))


class Odd(nn.Module):
    "A layer that runs twice, one that is not used for the scores, one that gives two tensors."
    def __init__(self):
        super().__init__()
        self.twice, self.unused, self.two = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), Two()

    def forward(self, x):
        self.unused(x)
        return self.two(self.twice(self.twice(x)))[0].mean((2, 3))


class Two(nn.Module):
    def forward(self, x): return x, x


@pytest.mark.parametrize("layers, told", [("twice", "more than once"), ("unused", "do not depend on"), ("two", "tuple"), ("twise", "Did you mean 'twice'")])
def test_layers_that_cannot_be_looked_at(layers, told):
    with pytest.raises(AttnnasError, match=told): gradcam(Odd(), torch.randn(2, 3, 4, 4), layers)


@pytest.mark.parametrize("model, x, told", [
    (nn.Conv2d(3, 3, 1), torch.randn(2, 3, 4, 4), "class scores"), (linear((4, 4)), torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "floating-point")])
def test_what_is_no_classifier_or_no_image(model, x, told):
    with pytest.raises(AttnnasError, match=told): gradcam(nn.Sequential(model, nn.Identity()), x, "0")
