"""Data made by a formula: three published heterogeneity generators and four quadratics.

The first two generators call NumPy's legacy random stream in the order of the published code, so
that their seeds give the published numbers. A seed belongs to the data set and not to
the run: repeating an experiment with another seed keeps the data.
"""

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
from pydantic import Field

from app.data import Dataset, Fraction, Positive, Seed, Split, hold_out
from app.errors import UserError

NonNegative = Annotated[float, Field(ge=0)]

# Four strongly convex quadratics 1/2 t'At - b't whose minimisers lie far apart: plain
# averaging with several local steps is visibly biased on them.
QUADRATICS_A = np.array(
    [
        [[1.0, 0.0], [0.0, 4.0]],
        [[3.0, 1.0], [1.0, 2.0]],
        [[0.5, 0.0], [0.0, 1.0]],
        [[2.0, -0.5], [-0.5, 5.0]],
    ]
)
QUADRATICS_B = np.array([[1.0, -2.0], [0.0, 3.0], [-4.0, 1.0], [2.0, 2.0]])


def synthetic_feddyn(
    dimension: Positive = 30,
    clients: Positive = 20,
    classes: Annotated[int, Field(ge=2)] = 5,
    average_samples: Positive = 200,
    alpha: NonNegative = 1.0,
    beta: NonNegative = 1.0,
    theta: NonNegative = 0.0,
    iid_solution: bool = True,
    iid_data: bool = True,
    validation: Fraction = 0.0,
    seed: Seed = 0,
) -> Dataset:
    """Return the linear classification task of Acar et al. 2021, natural by client.

    Client k draws inputs x ~ N(v_k, diag(j^-1.2)) and labels them by argmax(xW_k +
    c_k). The test split is the union of all training samples, as in the published code:
    the task measures optimisation, not generalisation.

    Parameters
    ----------
    dimension, clients, classes : int
        Size of x, number of clients and of classes.
    average_samples : int
        Median number of samples of a client.
    alpha : float
        Standard deviation of the mean of W_k and c_k; in use unless ``iid_solution``.
    beta : float
        Standard deviation of the mean of v_k; in use unless ``iid_data``.
    theta : float
        Sigma of the log-normal number of samples; 0 gives every client the same.
    iid_solution : bool
        All clients share one W and c.
    iid_data : bool
        All v_k are 0.
    validation : float
        See `app.data.hold_out`.
    seed : int
        Seed of the generator.

    Raises
    ------
    UserError
        If a client would have no sample.
    """
    rng = np.random.RandomState(seed)
    counts = rng.lognormal(np.log(average_samples + 1e-3), theta, clients).astype(int)
    if counts.min() < 1:
        raise UserError(
            f"synthetic_feddyn leaves client {counts.argmin()} without samples: raise "
            f"data.average_samples={average_samples} or lower data.theta={theta}."
        )
    mean_solution = rng.normal(0, alpha, clients)
    mean_shift = rng.normal(0, beta, clients)
    shift = np.zeros((clients, dimension))
    if not iid_data:
        for k in range(clients):
            shift[k] = rng.normal(mean_shift[k], 1, dimension)

    def solution(mean: float) -> tuple[np.ndarray, np.ndarray]:
        return rng.normal(mean, 1, (dimension, classes)), rng.normal(
            mean, 1, (1, classes)
        )

    # The published code draws this first solution even where it is replaced: skipping
    # it would move every later draw.
    weight, bias = solution(mean_solution[0])
    if iid_solution:
        weight, bias = solution(0)
    xs, ys = [], []
    for k in range(clients):
        if not iid_solution:
            weight, bias = solution(mean_solution[k])
        x = _inputs(rng, shift[k], counts[k])
        xs.append(x)
        ys.append(np.argmax(x @ weight + bias, axis=1))
    train = _split(np.concatenate(xs), np.concatenate(ys))
    natural = np.repeat(np.arange(clients), counts)
    names = [str(label) for label in range(classes)]
    data = Dataset(train, train, classes, "cross_entropy", natural, names)
    return hold_out(data, validation, seed)


def synthetic_fedprox(
    alpha: NonNegative = 1.0,
    beta: NonNegative = 1.0,
    users: Positive = 30,
    validation: Fraction = 0.0,
    seed: Seed = 0,
) -> Dataset:
    """Return Synthetic(alpha, beta) of Li et al. 2020, natural by client.

    60 inputs, 10 classes, LogNormal(4, 2) + 50 samples a client, of which a random
    tenth is for testing. Usual cases: (0, 0), (0.5, 0.5), (1, 1). The samples are those
    of the published code for the same seed; which of them are for testing is not.

    Parameters
    ----------
    alpha : float
        Standard deviation of the mean of each client's true model.
    beta : float
        Standard deviation of the mean of each client's inputs.
    users : int
        Number of clients.
    validation : float
        See `app.data.hold_out`.
    seed : int
        Seed of the generator.
    """
    dimension, classes = 60, 10
    rng = np.random.RandomState(seed)
    counts = rng.lognormal(4, 2, users).astype(int) + 50
    mean_solution = rng.normal(0, alpha, users)
    mean_shift = rng.normal(0, beta, users)
    shift = np.stack([rng.normal(mean_shift[k], 1, dimension) for k in range(users)])
    xs, ys, tests = [], [], []
    for k in range(users):
        weight = rng.normal(mean_solution[k], 1, (dimension, classes))
        bias = rng.normal(mean_solution[k], 1, classes)
        x = _inputs(rng, shift[k], counts[k])
        xs.append(x)
        ys.append(np.argmax(x @ weight + bias, axis=1))
    # After all samples, so that the stream above stays the published one.
    for count in counts:
        test = np.zeros(count, dtype=bool)
        test[rng.permutation(count)[int(0.9 * count) :]] = True
        tests.append(test)
    whole = _split(np.concatenate(xs), np.concatenate(ys))
    out = np.concatenate(tests)
    natural = np.repeat(np.arange(users), counts)[~out]
    names = [str(label) for label in range(classes)]
    data = Dataset(
        whole.take(~out), whole.take(out), classes, "cross_entropy", natural, names
    )
    return hold_out(data, validation, seed)


def synthetic_mixture(
    clients: Positive = 3,
    dimension: Positive = 5,
    components: Positive = 3,
    samples: Annotated[int, Field(ge=2)] = 200,
    test_samples: Positive = 5000,
    alpha: Annotated[float, Field(gt=0)] = 0.4,
    noise: NonNegative = 0.1,
    validation: Fraction = 0.0,
    seed: Seed = 0,
) -> Dataset:
    """Return the two-class mixture of Marfoq et al. 2021 (FedEM), natural by client.

    There are K true models theta_k ~ U(-1, 1)^d; client i has weights pi_i ~ Dir(alpha)
    over them. A sample has x ~ U(-1, 1)^d, a model k ~ pi_i and the label that
    sigmoid(x.theta_k + e), e ~ N(0, noise), rounds to. Every client has its own test
    samples; the test split is all of them.

    Parameters
    ----------
    clients, dimension, components : int
        Number of clients, size d of x and number K of true models.
    samples, test_samples : int
        Of each client.
    alpha : float
        How alike the clients' weights are.
    noise : float
        Standard deviation of e.
    validation : float
        See `app.data.hold_out`.
    seed : int
        Seed of the generator.
    """
    rng = np.random.RandomState(seed)
    weights = [rng.dirichlet(np.full(components, alpha)) for _ in range(clients)]
    true = rng.uniform(-1, 1, (components, dimension))

    def drawn(count: int) -> Split:
        xs, ys = [], []
        for weight in weights:
            of = np.repeat(np.arange(components), rng.multinomial(count, weight))
            x = rng.uniform(-1, 1, (count, dimension))
            logits = (x * true[of]).sum(axis=1) + rng.normal(0, noise, count)
            order = rng.permutation(count)
            xs.append(x[order])
            ys.append((logits > 0).astype(np.int64)[order])
        return _split(np.concatenate(xs), np.concatenate(ys))

    natural = np.repeat(np.arange(clients), samples)
    train, test = drawn(samples), drawn(test_samples)
    data = Dataset(train, test, 2, "cross_entropy", natural, ["0", "1"])
    return hold_out(data, validation, seed)


def quadratics(
    repeats: Sequence[Positive] = (1, 1, 1, 1),
    validation: Fraction = 0.0,
    seed: Seed = 0,
) -> Dataset:
    """Return four two-dimensional quadratics as least-squares tasks, natural by client.

    Client k has rows X and targets y (float64) with X'X/n = A_k and X'y/n = b_k, so
    that the loss mean (x.t - y)^2 / 2 is L_k(t) = t'A_k t / 2 - b_k't + constant. The
    minimiser of the sum of the L_k is (-0.18006431, 0.34083601). Use it with
    ``model=linear`` without bias. The test split is the training split.

    Parameters
    ----------
    repeats : Sequence[int]
        How often the two rows of each client are repeated: its weight, not its L_k.
    validation, seed
        See `app.data.hold_out`.

    Raises
    ------
    UserError
        If ``repeats`` is not four positive integers.
    """
    if len(repeats) != 4 or min(repeats) < 1:
        raise UserError(
            f"data.repeats={list(repeats)}: four positive integers are needed, one for "
            "each client."
        )
    xs, ys = [], []
    for a, b, repeat in zip(QUADRATICS_A, QUADRATICS_B, repeats, strict=True):
        # A = CC', so the rows sqrt(2) C' give X'X/2 = A; then X'y/2 = b fixes y.
        rows = np.sqrt(2) * np.linalg.cholesky(a).T
        xs.append(np.tile(rows, (repeat, 1)))
        ys.append(np.tile(np.linalg.solve(rows.T, 2 * b), repeat))
    x, y = np.concatenate(xs), np.concatenate(ys)
    natural = np.repeat(np.arange(4), 2 * np.asarray(repeats))
    train = Split(torch.from_numpy(x), torch.from_numpy(y))
    return hold_out(Dataset(train, train, 0, "squared", natural, []), validation, seed)


def _inputs(rng: np.random.RandomState, mean: np.ndarray, count: int) -> np.ndarray:
    """Draw from a normal distribution with the variances j^-1.2.

    The bits are those of ``rng.multivariate_normal``, which decomposes the covariance anew for
    each client: minutes for thousands of them.
    """
    deviations = np.sqrt(np.arange(1, len(mean) + 1) ** -1.2)
    drawn: np.ndarray = mean + rng.standard_normal((count, len(mean))) * deviations
    return drawn


def _split(x: np.ndarray, y: np.ndarray) -> Split:
    return Split(torch.from_numpy(x.astype(np.float32)), torch.from_numpy(y))
