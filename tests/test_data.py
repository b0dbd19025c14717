"""Data sets: shapes, published formulas, bringing one's own, and errors in one line."""

import csv
import inspect
import io
import os
import tarfile
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from app.arrays import npz
from app.data import Dataset, digits, hold_out, split_mask, thin
from app.errors import UserError
from app.images import imagefolder
from app.node_config import local_samples
from app.synthetic import (
    quadratics,
    synthetic_feddyn,
    synthetic_fedprox,
    synthetic_mixture,
)
from app.text import plays, speeches
from app.vision import cifar10, emnist, fashion_mnist, mnist

CONF = Path(__file__).parents[1] / "conf"
REAL = os.environ.get("FEDGRAD_DATA")
needs_data = pytest.mark.skipif(
    REAL is None, reason="set FEDGRAD_DATA to a folder with MNIST/, cifar10-jpeg.tar"
)


def one_line(caught: pytest.ExceptionInfo[UserError], *words: str) -> None:
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def same(a: Dataset, b: Dataset) -> bool:
    return all(
        torch.equal(getattr(getattr(a, part), name), getattr(getattr(b, part), name))
        for part in ("train", "test")
        for name in ("x", "y")
    )


@pytest.mark.parametrize("group", ["data", "partition", "model"])
def test_every_file_in_conf_repeats_the_defaults_of_its_function(group):
    files = sorted((CONF / group).glob("*.yaml"))
    assert files
    given = {"input_shape", "outputs", "vocabulary", "labels", "natural", "clients"}
    if group == "partition":
        given.add("seed")
    for file in files:
        knobs = yaml.safe_load(file.read_text())
        module, _, name = knobs.pop("_target_").rpartition(".")
        function = getattr(import_module(module), name)
        parameters = dict(inspect.signature(function).parameters)
        if group != "data":
            parameters = {k: v for k, v in parameters.items() if k not in given}
        assert set(knobs) == set(parameters), file
        preset = file.stem != name and group == "model"
        for knob, value in knobs.items():
            default = parameters[knob].default
            if isinstance(default, tuple):
                default = list(default)
            if default is not inspect.Parameter.empty and not preset:
                assert value == default, (file, knob)


def test_digits():
    data = digits()
    assert data.train.x.shape == (1437, 1, 8, 8)
    assert data.train.x.dtype == torch.float32
    assert data.test.y.shape == (360,)
    assert data.test.y.dtype == torch.int64
    assert float(data.train.x.min()) == 0 and float(data.train.x.max()) == 1
    assert data.test.y.bincount().min() >= 34
    assert same(data, digits(seed=7))


def test_hold_out_replaces_the_test_split():
    data = digits()
    tuning = digits(validation=0.2, seed=1)
    assert len(tuning.train) + len(tuning.test) == 1437
    assert abs(len(tuning.test) - 287) < 10
    rows = {row.numpy().tobytes() for row in data.test.x}
    assert not rows & {row.numpy().tobytes() for row in tuning.test.x}
    assert not same(tuning, digits(validation=0.2, seed=2))
    assert same(tuning, digits(validation=0.2, seed=1))


def test_hold_out_keeps_every_natural_client():
    data = quadratics(validation=0.5)
    assert data.natural is not None
    assert data.natural.tolist() == [0, 1, 2, 3]
    assert len(data.test) == 4


def test_thin_keeps_a_share_of_every_class():
    data = digits()
    few = thin(data, 0.25, 3)
    whole, kept = (torch.bincount(d.train.y).numpy() for d in (data, few))
    assert np.abs(kept - whole / 4).max() <= 1
    rows = {row.numpy().tobytes() for row in data.train.x}
    assert {row.numpy().tobytes() for row in few.train.x} <= rows
    assert torch.equal(few.test.x, data.test.x)
    assert same(few, thin(data, 0.25, 3)) and not same(few, thin(data, 0.25, 4))
    assert thin(data, 1.0, 0) is data
    own = thin(quadratics(repeats=(4, 4, 2, 4)), 0.5, 0)
    assert own.natural is not None and len(own.natural) == len(own.train)
    assert np.bincount(own.natural).tolist() == [4, 4, 2, 4]


@pytest.mark.parametrize("validation", [-0.1, 1.0, 1e-6])
def test_hold_out_refuses_impossible_shares(validation):
    with pytest.raises(UserError) as caught:
        hold_out(digits(), validation, 0)
    one_line(caught, "validation")


def test_split_mask_never_empties_a_group():
    groups = np.array([0, 1, 1, 2, 2, 2])
    mask = split_mask(groups, 0.99, 0)
    assert set(groups[~mask]) == {0, 1, 2}


def test_quadratics_have_the_stated_gradients_and_minimiser():
    from app.synthetic import QUADRATICS_A, QUADRATICS_B

    data = quadratics(repeats=(1, 2, 3, 1))
    assert data.train.x.dtype == torch.float64
    x, y = data.train.x.numpy(), data.train.y.numpy()
    total = np.zeros((2, 3))
    for k in range(4):
        mine = data.natural == k
        rows, target = x[mine], y[mine]
        for point in ([0.0, 0.0], [1.0, -2.0], [0.3, 7.0]):
            theta = np.array(point)
            slope = rows.T @ (rows @ theta - target) / len(rows)
            stated = QUADRATICS_A[k] @ theta - QUADRATICS_B[k]
            np.testing.assert_allclose(slope, stated, rtol=0, atol=1e-12)
        total += np.c_[rows.T @ rows, rows.T @ target] / len(rows)
    optimum = np.linalg.solve(total[:, :2], total[:, 2])
    np.testing.assert_allclose(optimum, [-0.18006431, 0.34083601], atol=5e-9)


def test_quadratics_weighted_by_rows():
    data = quadratics(repeats=(10, 20, 30, 40))
    x, y = data.train.x.numpy(), data.train.y.numpy()
    optimum = np.linalg.solve(x.T @ x, x.T @ y)
    np.testing.assert_allclose(optimum, [-0.18181818, 0.48387097], atol=5e-9)
    with pytest.raises(UserError) as caught:
        quadratics(repeats=(1, 2))
    one_line(caught, "repeats", "four")


def test_synthetic_feddyn_is_separable_by_its_shared_solution():
    """Replays the stream by hand: sizes, means, shifts, two solutions, then samples."""
    data = synthetic_feddyn(dimension=6, clients=3, classes=4, average_samples=20)
    rng = np.random.RandomState(0)
    for size in (3, 3, 3):
        rng.normal(size=size)
    rng.normal(size=(6, 4)), rng.normal(size=(1, 4))
    weight, bias = rng.normal(size=(6, 4)), rng.normal(size=(1, 4))
    covariance = np.diag([(j + 1) ** -1.2 for j in range(6)])
    x = rng.multivariate_normal(np.zeros(6), covariance, 20)
    np.testing.assert_allclose(data.train.x[:20].numpy(), x, rtol=1e-6)
    assert (data.train.y[:20].numpy() == np.argmax(x @ weight + bias, 1)).all()
    assert same(data, Dataset(data.train, data.train, 4, "", None, []))
    assert data.natural is not None
    assert np.bincount(data.natural).tolist() == [20, 20, 20]


def test_synthetic_feddyn_heterogeneity():
    spread = synthetic_feddyn(iid_data=False, iid_solution=False, theta=1.0)
    counts = np.bincount(spread.natural)
    assert counts.max() > 3 * counts.min()
    centres = [spread.train.x[spread.natural == k].mean() for k in range(20)]
    assert float(torch.stack(centres).std()) > 0.3
    with pytest.raises(UserError) as caught:
        synthetic_feddyn(average_samples=1, theta=3.0)
    one_line(caught, "average_samples", "theta")


def test_synthetic_fedprox():
    data = synthetic_fedprox(users=5)
    assert data.train.x.shape[1] == 60
    counts = np.bincount(data.natural)
    assert len(counts) == 5 and counts.min() >= 45
    assert abs(len(data.test) / (len(data.test) + len(data.train)) - 0.1) < 0.01
    assert same(data, synthetic_fedprox(users=5))
    assert not same(data, synthetic_fedprox(users=5, seed=1))


def test_synthetic_mixture():
    data = synthetic_mixture(clients=4, samples=300, test_samples=7, noise=0)
    assert data.train.x.shape == (1200, 5) and len(data.test) == 28
    assert (np.bincount(data.natural) == 300).all()
    assert data.train.x.abs().max() <= 1 and set(data.train.y.tolist()) == {0, 1}
    assert same(data, synthetic_mixture(4, samples=300, test_samples=7, noise=0))
    # One true model, no noise: a plane through zero separates the classes; three do not agree.
    for components, fits in ((1, True), (3, False)):
        data = synthetic_mixture(components=components, noise=0, seed=1)
        x, y = data.train.x.double(), 2.0 * data.train.y.double() - 1
        theta = torch.zeros(5, dtype=x.dtype)
        for _ in range(3000):
            wrong = (x @ theta * y <= 0).double()
            theta += ((wrong * y)[:, None] * x).mean(0)
        assert bool((x @ theta * y > 0).all()) == fits


def test_npz_with_clients_and_its_own_split(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (40, 3), dtype=np.uint8)
    who = np.array(["b", "a"] * 20)
    file = tmp_path / "mine.npz"
    np.savez(file, x=x, kind=np.arange(40) % 4, who=who)
    data = npz(str(file), label="kind", client="who", scale=255, test=0.25)
    assert data.classes == 4 and data.loss == "cross_entropy"
    assert len(data.train) == 30 and len(data.test) == 10
    assert float(data.train.x.max()) <= 1
    assert np.bincount(data.natural).tolist() == [15, 15]
    target = x[:, 0] / 2
    np.savez(file, x=x, y=target, x_test=x[:5], y_test=target[:5])
    data = npz(str(file))
    assert (data.classes, data.loss) == (0, "squared")
    assert len(data.train) == 40 and len(data.test) == 5
    assert data.train.y.dtype == torch.float32


@pytest.mark.parametrize(
    ("arrays", "knobs", "word"),
    [
        (
            {"x": np.ones((4, 2)), "labels": np.arange(4)},
            {"label": "label"},
            "'labels'",
        ),
        ({"x": np.ones((4, 2)), "y": np.arange(3)}, {}, "shape (3,)"),
        ({"x": np.ones((4, 2)), "y": np.arange(4) - 1}, {}, "negative"),
        ({"x": np.ones((4, 2)) * np.nan, "y": np.arange(4)}, {}, "NaN"),
        ({"x": np.ones(4), "y": np.arange(4)}, {}, "shape (4,)"),
        ({"x": np.ones((4, 2)), "y": np.array([{}] * 4)}, {}, "plain arrays"),
        ({"x": np.ones((4, 2)), "y": np.arange(4)}, {"client": "who"}, "'who'"),
        (
            {"x": np.ones((4, 2)), "y": np.arange(4), "who": np.arange(2)},
            {"client": "who"},
            "one client",
        ),
        ({"x": np.ones((4, 2)), "y": np.arange(4), "x_test": np.ones(1)}, {}, "y_test"),
        ({"x": np.ones((4, 2)), "y": np.arange(4) + 10**9}, {}, "class 1000000003"),
    ],
)
def test_npz_mistakes_are_told_in_one_line(tmp_path, arrays, knobs, word):
    file = tmp_path / "mine.npz"
    np.savez(file, allow_pickle=True, **arrays)
    with pytest.raises(UserError) as caught:
        npz(str(file), **knobs)
    one_line(caught, "mine.npz", word)


def test_npz_missing_or_damaged(tmp_path):
    file = tmp_path / "mine.npz"
    with pytest.raises(UserError) as caught:
        npz(str(file))
    one_line(caught, "no such file")
    np.savez(file, x=np.ones((4, 2)), y=np.arange(4))
    for content in (b"", b"text", file.read_bytes()[:300]):
        file.write_bytes(content)
        with pytest.raises(UserError) as caught:
            npz(str(file))
        one_line(caught, "readable")


@pytest.fixture
def pictures(tmp_path):
    """Two classes of 6x5 pictures whose grey level is their number."""
    root = tmp_path / "pictures"
    for split, count in (("train", 3), ("test", 1)):
        for label, base in (("cat", 0), ("ant", 100)):
            folder = root / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                level = base + 10 * number
                image = Image.new("RGB", (6, 5), (level, level, level))
                image.save(folder / f"{number}.png")
    return root


def test_imagefolder_and_its_tar_agree(pictures, tmp_path):
    data = imagefolder(str(pictures), mean=[0.0], std=[1.0])
    assert data.labels == ["ant", "cat"]
    assert data.train.x.shape == (6, 3, 5, 6)
    levels = (data.train.x[:, 0, 0, 0] * 255).round().int().tolist()
    assert levels == [100, 110, 120, 0, 10, 20]
    assert data.train.y.tolist() == [0, 0, 0, 1, 1, 1]
    for suffix, mode in ((".tar", "w"), (".tar.gz", "w:gz")):
        file = tmp_path / f"packed{suffix}"
        with tarfile.open(file, mode) as archive:
            # Outer folder and reverse order: neither may matter.
            for path in sorted(pictures.rglob("*.png"), reverse=True):
                name = path.relative_to(pictures.parent)
                archive.add(path, arcname=f"./{name}")
        assert same(data, imagefolder(str(file), mean=[0.0], std=[1.0]))
    few = imagefolder(str(pictures), share=0.34)
    assert few.train.y.bincount().tolist() == [1, 1] and len(few.test) == 2
    small = imagefolder(str(pictures), size=4, grey=True)
    assert small.train.x.shape == (6, 1, 4, 4)
    assert float(small.train.x.min()) == -1


def test_imagefolder_cache_follows_the_pictures(pictures, tmp_path):
    cache = tmp_path / "new" / "cache.npz"
    first = imagefolder(str(pictures), cache=str(cache))
    written = cache.stat().st_mtime_ns
    assert same(first, imagefolder(str(pictures), cache=str(cache)))
    assert cache.stat().st_mtime_ns == written
    (pictures / "train" / "ant" / "2.png").unlink()
    assert len(imagefolder(str(pictures), cache=str(cache)).train) == 5
    assert [path.name for path in cache.parent.iterdir()] == ["cache.npz"]
    cache.write_bytes(b"nonsense")
    with pytest.raises(UserError) as caught:
        imagefolder(str(pictures), cache=str(cache))
    one_line(caught, "cache", "delete")
    with pytest.raises(UserError) as caught:
        imagefolder(str(pictures), cache=str(cache / "below" / "a.npz"))
    one_line(caught, "cache")


@pytest.mark.parametrize("grey", [True, False])
def test_pictures_of_sixteen_bits_keep_their_levels(pictures, grey):
    for number, level in enumerate((0, 257 * 100, 65535)):
        deep = Image.fromarray(np.full((5, 6), level, np.uint16))
        deep.save(pictures / "train" / "ant" / f"{number}.png")
    data = imagefolder(str(pictures), grey=grey, mean=[0.0], std=[1.0])
    levels = (data.train.x[data.train.y == 0, 0, 0, 0] * 255).round().int().tolist()
    assert levels == [0, 100, 255]


def test_a_cache_that_cannot_be_written_is_told(pictures, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(UserError, match=r"data\.cache=.*: No space left"):
        imagefolder(str(pictures), cache=str(pictures / "kept.npz"))
    assert not list(pictures.glob(".*"))


def test_a_nodes_own_pictures_are_known_by_the_names_of_their_classes(pictures):
    """Nodes need not have the same classes, and their pictures not the run's size."""
    given = ["data=described", "data.shape=[1,8,8]", "data.classes=3"]
    named = (*given, "data.labels=[dog,cat,ant]")
    mine = local_samples(str(pictures), "y", named)
    assert mine.train.x.shape == (6, 1, 8, 8)
    assert sorted(mine.train.y.tolist()) == [1, 1, 1, 2, 2, 2]
    assert float(mine.train.x[mine.train.y == 1].max()) < -0.8  # cats are dark
    for other, words in (
        (given, ["class 'ant'", "0, 1, 2"]),
        ([*given, "data.labels=[dog,cat]"], ["2 names for 3 classes"]),
        (["data=described", "data.shape=[64]", "data.classes=2"], ["(64,)"]),
    ):
        with pytest.raises(UserError) as caught:
            local_samples(str(pictures), "y", tuple(other))
        one_line(caught, *words)


def test_a_nodes_own_data_are_of_the_runs_kind(pictures, tmp_path):
    with pytest.raises(UserError, match="pictures go with data=imagefolder"):
        local_samples(str(pictures), "y", ("data=digits",))
    file, x = tmp_path / "own.npz", np.zeros((30, 1, 8, 8), np.float32)
    np.savez(file, x=x, y=np.arange(30) % 10 + 0.0)
    with pytest.raises(UserError, match="y are numbers where the run has classes"):
        local_samples(str(file), "y", ("data=digits",))


def test_a_nodes_own_numbers_are_scaled_as_the_runs(tmp_path):
    x, y = np.full((20, 4), 255.0, np.float32), np.arange(20) % 2
    np.savez(tmp_path / "mine.npz", x=x, y=y)
    given = ("data=npz", f"data.path={tmp_path}/mine.npz", "data.scale=255")
    mine = local_samples(str(tmp_path / "mine.npz"), "y", given)
    assert float(mine.train.x.max()) == 1.0


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], ["more classes than the run's 10"]),
        (["data.classes=11", "client_validation=0.01"], ["keeps 0 of 20 training"]),
        (["data.classes=11", "client_test=0.01"], ["test=0.01", "leaves no test"]),
    ],
)
def test_mistakes_in_a_nodes_own_data_name_its_file(tmp_path, given, words):
    """Of a class that only its test samples have, too."""
    file, x, y = tmp_path / "own.npz", np.zeros((30, 4), np.float32), np.arange(30) % 10
    np.savez(file, x=x, y=y, x_test=x, y_test=y + 1)
    if given:
        np.savez(file, x=x, y=y)
    described = ("data=described", "data.shape=[4]", "data.classes=10", *given)
    with pytest.raises(UserError) as caught:
        local_samples(str(file), "y", described)
    one_line(caught, "own.npz", *words)
    with pytest.raises(UserError, match=r"none\.npz: nothing is there; data-path"):
        local_samples(str(tmp_path / "none.npz"), "y", described)


def test_a_nodes_own_test_samples_are_as_many_as_the_run_says(tmp_path):
    file, x = tmp_path / "own.npz", np.zeros((40, 4), np.float32)
    np.savez(file, x=x, y=np.arange(40) % 2)
    run = ("data=npz", f"data.path={file}")
    for given, kept in (((), 8), (("data.test=0.5",), 20), (("client_test=0.25",), 10)):
        assert len(local_samples(str(file), "y", (*run, *given)).test) == kept


def test_imagefolder_mistakes(pictures, tmp_path):
    def told(*words: str, root: Path = pictures, **knobs: object) -> None:
        with pytest.raises(UserError) as caught:
            imagefolder(str(root), **knobs)  # type: ignore[arg-type]
        one_line(caught, *words)

    told("does not exist", root=tmp_path / "nothing")
    told("no picture in train", root=tmp_path)
    told("mean", mean=[0.1, 0.2])
    Image.new("RGB", (7, 5)).save(pictures / "train" / "ant" / "9.png")
    told("7x5", "data.size")
    (pictures / "train" / "ant" / "9.png").write_bytes(b"not a picture")
    told("9.png", "JPEG")
    (pictures / "train" / "ant" / "9.png").unlink()
    (pictures / "test" / "cat").rename(pictures / "test" / "dog")
    told("'dog'")
    damaged = tmp_path / "damaged.tar"
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.add(pictures, arcname=".")
    for content in (b"not a tar", buffer.getvalue()[:4000]):
        damaged.write_bytes(content)
        told("damaged.tar", root=damaged)


PLAY = "".join(
    f"{role}:\n{words * 30}\n\n"
    for role, words in (("ROMEO", "but soft, "), ("All", "hey "), ("JULIET", "o me! "))
)


def test_plays(tmp_path):
    file = tmp_path / "play.txt"
    file.write_text(PLAY + "A paragraph without a role\nis left out.\n")
    data = plays(str(file), minimum=150, length=8, stride=2)
    assert data.vocabulary == data.classes == len(data.labels)
    assert set(data.natural) == {0, 1}
    first = "".join(data.labels[c] for c in data.train.x[0])
    assert first == "o me! o "
    assert data.labels[data.train.y[0]] == "m"
    assert data.train.x.shape[1] == 8 and data.train.x.dtype == torch.int64
    assert speeches(PLAY)["All"] == "hey " * 30 + "\n"
    for knobs in ({"minimum": 9999}, {"minimum": 1, "length": 200}):
        with pytest.raises(UserError) as caught:
            plays(str(file), **knobs)
        one_line(caught, "minimum")
    with pytest.raises(UserError) as caught:
        plays(str(tmp_path / "none.txt"))
    one_line(caught, "no such file")


@pytest.mark.parametrize("function", [mnist, emnist, cifar10])
def test_missing_roots_are_told(tmp_path, function):
    with pytest.raises(UserError) as caught:
        function(str(tmp_path / "nowhere"))
    one_line(caught, "nowhere", "data.download=true")


def write_idx(file: Path, array: np.ndarray) -> None:
    """Write the format of MNIST's files."""
    head = bytes([0, 0, 8, array.ndim])
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    file.write_bytes(head + sizes + array.astype(np.uint8).tobytes())


def test_emnist_letters_are_upright_limited_and_counted_from_zero(tmp_path):
    raw = tmp_path / "EMNIST" / "raw"
    raw.mkdir(parents=True)
    images = np.zeros((6, 28, 28))
    images[:, 2, 5] = 255
    for split in ("train", "test"):
        write_idx(raw / f"emnist-letters-{split}-images-idx3-ubyte", images)
        write_idx(
            raw / f"emnist-letters-{split}-labels-idx1-ubyte",
            np.array([1, 2, 3, 26, 1, 2]),
        )
    data = emnist(str(tmp_path), limit=2)
    assert data.train.y.tolist() == [0, 1, 0, 1]
    assert data.labels == ["a", "b"]
    assert int(data.train.x[0, 0].argmax()) == 5 * 28 + 2
    assert len(emnist(str(tmp_path)).train) == 6
    with pytest.raises(UserError) as caught:
        emnist(str(tmp_path), limit=27)
    one_line(caught, "26")


def small_mnist(tmp_path: Path, train: int, test: int, folder: str = "MNIST") -> Path:
    """Write MNIST's files with grey noise of which half of each image never changes."""
    raw = tmp_path / folder / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("t10k", test)):
        images = rng.integers(0, 256, (count, 28, 28))
        images[:, :14] = 7
        write_idx(raw / f"{part}-images-idx3-ubyte", images)
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(count) % 10)
    return tmp_path


@pytest.mark.parametrize("load", [mnist, fashion_mnist])
def test_mnist_as_one_pool(tmp_path, load):
    folder = {mnist: "MNIST", fashion_mnist: "FashionMNIST"}[load]
    root = str(small_mnist(tmp_path, 40, 20, folder))
    apart, pool = load(root), load(root, pool=True)
    assert pool.train.x.shape == (60, 1, 28, 28) and len(pool.test) == 0
    torch.testing.assert_close(
        pool.train.x, torch.cat([apart.train.x, apart.test.x]), rtol=0, atol=0
    )
    assert pool.train.y.tolist() == apart.train.y.tolist() + apart.test.y.tolist()


@pytest.mark.parametrize("pool", [False, True])
def test_mnist_normalized_pixel_by_pixel(tmp_path, pool):
    """By the training set's own numbers; what never changes becomes zero, not NaN."""
    data = mnist(str(small_mnist(tmp_path, 40, 20)), pool=pool, normalize="pixels")
    still, moving = data.train.x[:, 0, :14], data.train.x[:, 0, 14:]
    assert not still.any()
    torch.testing.assert_close(moving.mean(0), torch.zeros(14, 28), rtol=0, atol=1e-5)
    spread = moving.std(0, correction=0)
    torch.testing.assert_close(spread, torch.ones(14, 28), rtol=0, atol=1e-4)
    if not pool:
        assert float(data.test.x[:, 0, 14:].mean(0).abs().max()) > 0.1


def test_the_clients_own_test_samples_are_the_test_set(tmp_path, run):
    root = small_mnist(tmp_path, 90, 30)
    given = ("data=mnist", f"data.root={root}", "data.pool=true", "client_test=0.25")
    result = run(*given, "model=linear", "clients=6", "rounds=2", quick=QUICK_HERE)
    with open(result.path / "clients.csv", newline="") as file:
        last = [r for r in csv.DictReader(file) if r["round"] == "3"]
    assert len(last) == 6 and {r["split"] for r in last} == {"test"}
    # 20 samples each, 15 and 5: equal parts, so that the pooled accuracy is the mean.
    mean = np.mean([float(r["accuracy"]) for r in last])
    assert result.summary["accuracy"] == pytest.approx(mean, abs=1e-6)


QUICK_HERE = (
    *("partition=iid", "clients_per_round=3", "local.epochs=1", "device=cpu"),
    *("nodes=2", "processes=0"),
)


def test_damaged_mnist_is_told(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        write_idx(raw / f"{part}-images-idx3-ubyte", np.zeros((4, 28, 28)))
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(4))
    assert mnist(str(tmp_path)).train.x.shape == (4, 1, 28, 28)
    file = raw / "train-images-idx3-ubyte"
    whole = file.read_bytes()
    for content in (b"", whole[:10], whole[:1000], whole[: 16 + 2 * 784]):
        file.write_bytes(content)
        with pytest.raises(UserError) as caught:
            mnist(str(tmp_path))
        one_line(caught, "MNIST", "data.root")


def test_cifar_that_is_not_the_published_one_is_never_opened(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in [f"data_batch_{k}" for k in range(1, 6)] + [
        "test_batch",
        "batches.meta",
    ]:
        (folder / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(UserError) as caught:
        cifar10(str(tmp_path))
    one_line(caught, "CIFAR10")


@needs_data
def test_real_mnist():
    data = mnist(str(REAL))
    assert data.train.x.shape == (60000, 1, 28, 28)
    assert len(data.test) == 10000
    assert abs(float(data.train.x.mean())) < 1e-3
    assert abs(float(data.train.x.std()) - 1) < 1e-3


@needs_data
def test_real_plays():
    data = plays(f"{REAL}/shakespeare/tinyshakespeare.txt")
    assert data.vocabulary == 65
    assert len(set(data.natural)) == 99
