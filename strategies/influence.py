"""Influence: what leaving out one training sample does to everybody's validation loss.

Client i weighs the loss of its training sample j by 1 + l_ij. All clients train one model,

    x*(l) = argmin (1/n) sum_i f_i(x, l_i)       F(l) = (1/n) sum_i F_i(x*(l))

with f_i the mean over its N_i training samples, and F_i over samples that it does not train on. The
sample is left out at l_ij = -1, where f_i still divides by N_i: the others keep their weights. To
first order (Koh and Liang 2017, arXiv 1703.04730; over a network Terashita and Hara,
arXiv 2210.02129v3, section 5.2)

    F(l_ij = -1) - F(0)  ~  -v_ij      v_i = dF/dl_i = -(1/n) J_i' (H + damping I)^-1 g

so that one hyper-gradient (`hypergrad.py`) predicts the change for every sample of every client,
and v_i stays with client i. Below zero the sample is harmful: without it the loss falls.

The prediction is as good as three assumptions: x* is a minimum, so that it has such derivatives;
the inverse is found, to which few steps or a large ``damping`` are a hindrance; one sample's weight
moves x* so little that second order does not count. Held against retraining (`left_out`), it says
itself whether they hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Lt
from torch import Tensor

from strategies.hypergrad import HGP, Watch, hypergradients
from strategies.hyperproblem import Found, conjugate_gradients
from strategies.randomness import permutations
from strategies.weighted import Task

if TYPE_CHECKING:
    from strategies.network import Network


@dataclass(frozen=True)
class Influence(HGP):
    """How influence is estimated and checked; see `HGP` for what is inherited.

    Attributes
    ----------
    method : {"push", "conjugate_gradients"}
        Over a network, or with exact averages and at most ``depth`` iterations.
    damping : float
        Added to the eigenvalues of the Hessian, which the estimate alone sees.
    samples : int
        At most so many samples of a client, training and validation; 0 all.
    check : int
        Training samples that are left out in turn, each with a retraining; 0 checks nothing.
    select : {"random", "largest"}
        Which: drawn with the run's seed, or those with the largest predictions.
    train_steps : int
        Gradient steps of a training; a linear model is trained to its minimizer instead.
    retrain_steps : int
        Steps after a sample is left out, from the trained model; 0 trains anew from the start.
    """

    method: Literal["push", "conjugate_gradients"] = "push"
    damping: Annotated[float, Ge(0), Lt(float("inf"))] = 0.0
    samples: Annotated[int, Ge(0)] = 0
    check: Annotated[int, Ge(0)] = 50
    select: Literal["random", "largest"] = "random"
    train_steps: Annotated[int, Ge(1)] = 1000
    retrain_steps: Annotated[int, Ge(0)] = 0


def predict(
    task: Task,
    theta: Tensor,
    network: Network,
    settings: Influence,
    watch: Watch | None = None,
) -> Found:
    """Return the hyper-gradients by the samples' weights: the predictions are minus them.

    Parameters
    ----------
    task, theta : Task, Tensor
        The clients, and the model that they trained, (d,).
    network : Network
        Over which; conjugate gradients average exactly instead.
    settings : Influence
        How.
    watch : callable, optional
        Sees the estimate after each step, of conjugate gradients at the end alone.

    Raises
    ------
    ValueError
        If the mean Hessian is not positive definite or something not finite (conjugate gradients),
        or the number of clients is not the network's.

    Warns
    -----
    RuntimeWarning
        If alpha is too large, the model is not at a minimum, or ``depth`` conjugate gradients are
        too few.
    """
    problem = task.problem(theta, settings.damping)
    if settings.method == "push":
        return hypergradients(problem, network, settings, watch=watch)
    found = conjugate_gradients(problem, settings.depth)
    if watch:
        watch(found.exchanges, found)
    return found


def selected(settings: Influence, predicted: Tensor, seed: int) -> Tensor:
    """Return the samples to be left out, numbered as in `weighted.Task`, ascending.

    Raises
    ------
    ValueError
        If there are fewer.
    """
    count, check = len(predicted), settings.check
    if check > count:
        raise ValueError(f"check={check}: there are only {count} training samples")
    if settings.select == "largest":
        order = predicted.abs().nan_to_num().argsort(descending=True, stable=True)
    else:
        order = permutations(seed, "influence check", 0, [0], count)[0]
    return order[:check].sort().values


def left_out(
    task: Task,
    samples: Sequence[int],
    retrain: Callable[[Tensor], Tensor],
    base: Tensor,
) -> Iterator[float]:
    """Yield how the mean validation loss changes when samples are left out, one at a time.

    Parameters
    ----------
    task : Task
        The clients.
    samples : sequence of int
        Which, numbered as in `weighted.Task`.
    retrain : callable
        Trains a model (d,) with weights (N,) of the samples.
    base : Tensor
        The model that ``retrain`` gives with all of them: what is left of the training itself does
        not count.
    """
    before, _ = task.judged(base)
    for sample in samples:
        yield task.judged(retrain(task.without(sample)))[0] - before
