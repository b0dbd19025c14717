"""Models: sizes, seeds, dropout under torch.func, and errors in one line."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from app import models
from app.building import make_model
from app.data import Dataset, Split
from app.errors import UserError
from app.layers import LSTM, Dropout, noise_shapes, probe


def dataset(shape: tuple[int, ...], classes: int = 10, vocabulary: int = 0) -> Dataset:
    """Two samples of a shape."""
    x = torch.zeros(2, *shape, dtype=torch.int64 if vocabulary else torch.float32)
    split = Split(x, torch.zeros(2, dtype=torch.int64))
    return Dataset(split, split, classes, "cross_entropy", None, [], vocabulary)


MNIST, CIFAR = dataset((1, 28, 28)), dataset((3, 32, 32))
TEXT = dataset((12,), 80, 80)

# Counted by hand, or stated by the authors (cnn_sophia, cnn_mnist).
CASES = [
    (models.linear, MNIST, 7_850),
    (partial(models.linear, bias=False, zero=True), MNIST, 7_840),
    (models.mlp, MNIST, 50_890),
    (partial(models.mlp, hidden=[200, 200]), MNIST, 199_210),
    (partial(models.mlp, hidden=[100], dropout=0.5), MNIST, 79_510),
    (models.cnn_mnist, MNIST, 1_663_370),
    (models.cnn_cifar, CIFAR, 797_962),
    (models.cnn_sophia, MNIST, 21_840),
    (models.resnet18, CIFAR, 11_181_642),
    (partial(models.resnet18, stem="cifar"), CIFAR, 11_173_962),
    (models.char_lstm, TEXT, 133_520),
]


@pytest.mark.parametrize(("model", "data", "count"), CASES)
def test_parameter_counts_and_outputs(model, data, count):
    module = make_model(model, data, seed=0).eval()
    assert sum(p.numel() for p in module.parameters()) == count
    with torch.no_grad():
        assert module(data.train.x).shape == (2, data.classes)


def test_weights_depend_on_the_seed_alone():
    before = torch.get_rng_state()
    first = make_model(models.mlp, MNIST, seed=1)
    torch.rand(5)
    again = make_model(models.mlp, MNIST, seed=1)
    other = make_model(models.mlp, MNIST, seed=2)
    assert all(map(torch.equal, first.parameters(), again.parameters()))
    assert not torch.equal(first[1].weight, other[1].weight)
    torch.set_rng_state(before)
    make_model(models.mlp, MNIST, seed=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_regression_gives_one_number_for_each_sample_in_its_precision():
    x = torch.zeros(3, 4, dtype=torch.float64)
    split = Split(x, torch.zeros(3, dtype=torch.float64))
    data = Dataset(split, split, 0, "squared", None, [])
    module = make_model(models.linear, data, seed=0)
    assert module(x).shape == (3,)
    assert module(x).dtype == torch.float64


def test_conv_models_fit_the_embedded_digits():
    digits = dataset((1, 8, 8))
    assert make_model(models.cnn_mnist, digits, 0)(digits.train.x).shape == (
        2,
        10,
    )


@pytest.mark.parametrize(
    ("model", "data"),
    [
        (models.cnn_mnist, dataset((64,))),
        (models.cnn_cifar, dataset((1, 8, 8))),
        (models.cnn_sophia, dataset((1, 8, 8))),
        (models.resnet18, dataset((64,))),
        (models.char_lstm, MNIST),
        (models.mlp, TEXT),
        (partial(models.resnet18, groups=3), CIFAR),
    ],
)
def test_a_model_that_does_not_fit_is_told_in_one_line(model, data):
    with pytest.raises(UserError) as caught:
        make_model(model, data, seed=0)
    assert "\n" not in str(caught.value)


def test_noise_shapes_are_per_sample():
    module = make_model(models.cnn_sophia, MNIST, seed=0)
    assert noise_shapes(module) == {"4.noise": (20, 1, 1), "10.noise": (50,)}
    assert noise_shapes(make_model(models.mlp, MNIST, seed=0)) == {}


@pytest.mark.parametrize("channelwise", [False, True])
def test_dropout_has_the_semantics_of_torch(channelwise):
    """Same support, same scale; the mask that torch drew is handed over as noise."""
    p = 0.3
    x = torch.rand(6, 5, 4, 4) + 1
    torch_layer = (nn.Dropout2d if channelwise else nn.Dropout)(p)
    with torch.random.fork_rng(devices=[]):
        expected = torch_layer(x)
    kept = (expected != 0).float()
    noise = kept.amax((2, 3), keepdim=True) if channelwise else kept
    layer = Dropout(p, channelwise)
    probe(layer, (5, 4, 4))
    assert noise_shapes(layer) == {"noise": tuple(noise.shape[1:])}
    torch.testing.assert_close(functional_call(layer, {"noise": noise}, x), expected)
    assert torch.equal(layer.eval()(x), x)


def test_dropout_without_noise_refuses_to_train():
    module = make_model(models.cnn_sophia, MNIST, seed=0)
    with pytest.raises(RuntimeError, match="needs noise"):
        module(MNIST.train.x)


def test_dropout_drops_its_share():
    layer = Dropout(0.25)
    probe(layer, (1000,))
    noise = torch.rand(100, 1000, generator=torch.Generator().manual_seed(0))
    out = functional_call(layer, {"noise": noise}, torch.ones(100, 1000))
    assert abs(float((out == 0).float().mean()) - 0.25) < 0.005
    assert abs(float(out.mean()) - 1) < 0.01


@pytest.mark.parametrize(
    ("model", "data"),
    [(models.cnn_sophia, MNIST), (partial(models.char_lstm, hidden=6), TEXT)],
)
def test_gradients_and_hessian_products_pass_through_vmap(model, data):
    """Three clients at once give what each gives alone."""
    module = make_model(model, data, seed=0)
    generator = torch.Generator().manual_seed(0)
    params = {name: p.detach() for name, p in module.named_parameters()}
    many = {name: torch.stack([p, p * 0.5, p * 1.5]) for name, p in params.items()}
    noise = {
        name: torch.rand(3, 2, *shape, generator=generator)
        for name, shape in noise_shapes(module).items()
    }
    if data.vocabulary:
        x = torch.randint(80, (3, 2, 12), generator=generator)
    else:
        x = torch.rand(3, 2, 1, 28, 28, generator=generator)
    y = torch.tensor([1, 7])

    def loss(params, noise, x):
        logits = functional_call(module, {**params, **noise}, (x,))
        return nn.functional.cross_entropy(logits, y)

    def both(params, noise, x):
        """Return the gradient g, and the Hessian times the parameters."""

        def slope(p):
            g = grad(loss)(p, noise, x)
            return sum((g[name] * params[name].detach()).sum() for name in g)

        return grad(loss)(params, noise, x), grad(slope)(params)

    together = vmap(both)(many, noise, x)
    for k in range(3):
        mine = {name: p[k] for name, p in many.items()}
        alone = both(mine, {name: n[k] for name, n in noise.items()}, x[k])
        for name in params:
            for one, all_three in zip(alone, together, strict=True):
                torch.testing.assert_close(
                    all_three[name][k], one[name], rtol=1e-3, atol=1e-5
                )


def test_lstm_agrees_with_torch():
    mine, theirs = LSTM(3, 5), nn.LSTM(3, 5, batch_first=True)
    with torch.no_grad():
        for name, parameter in mine.named_parameters():
            parameter.copy_(getattr(theirs, f"{name}_l0"))
        x = torch.randn(2, 7, 3)
        torch.testing.assert_close(mine(x), theirs(x)[0])
