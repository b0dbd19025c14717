"""Derivatives that cross the network: equal to centralized autograd, in every mode.

A program is written once over a set of verbs: the federated ones, or their centralized twins
below, which keep all clients' values in one torch graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from strategies import fad
from strategies.fad_client import Answer, BadPlan, Call, Plan, Question
from strategies.fad_site import FUNCTIONS, Site, register
from strategies.fad_wire import InProcess

Program = Callable[..., Tensor]


def vector(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


@register
def residual(site: Site, theta: Tensor) -> Tensor:
    """Return 1/2 (<x, theta> - 1)^2, for the tutorial of DrJAX."""
    return 0.5 * (site.x @ theta - 1).square()


@register
def own(site: Site) -> Tensor:
    """Return what the client has, whatever its shape."""
    return site.x


@register
def noisy_descent(site: Site, theta: Tensor, lr: Tensor) -> Tensor:
    """Three noisy gradient steps on a loss that is not quadratic."""
    noise = torch.randn(3, generator=site.generator("noisy_descent"), dtype=theta.dtype)

    def f(point: Tensor) -> Tensor:
        return torch.cosh(site.x @ point).log() + 0.1 * (point - noise).square().sum()

    for _ in range(3):
        theta = theta - lr * torch.func.grad(f)(theta)
    return theta


@register
def mix(site: Site, a: Tensor, b: Tensor) -> Tensor:
    """Return a smooth function of two values and the client's own."""
    return torch.sin(a) * b + site.x[: len(a)] * a


@register
def size(site: Site, a: Tensor) -> Tensor:
    """Return a positive number."""
    return 0.5 + a.square().mean()


def sites(count: int = 4, seed: int = 0) -> list[Site]:
    random = torch.Generator().manual_seed(seed)
    draw = torch.randn(count, 3, generator=random, dtype=torch.float64)
    return [Site(k, draw[k], torch.zeros(k + 1), seed=5) for k in range(count)]


def clients(nodes: int = 2, count: int = 4) -> fad.Clients:
    return fad.Clients(InProcess(sites(count), nodes))


class Central:
    """The verbs with all clients' values in one graph: the oracle."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self.sites = sites

    def broadcast(self, x: Tensor, _: Any) -> list[Tensor]:
        return [x for _ in self.sites]

    def federated_map(
        self, name: str, *values: list[Tensor], over: Any = None, round: int = 1
    ) -> list[Tensor]:
        rows = zip(*values, strict=True) if values else [()] * len(self.sites)
        at = [Site(s.id, s.x, s.y, s.seed, round) for s in self.sites]
        return [FUNCTIONS[name](s, *row) for s, row in zip(at, rows, strict=True)]

    def federated_sum(self, c: list[Tensor]) -> Tensor:
        return torch.stack(c).sum(0)

    def federated_mean(self, c: list[Tensor]) -> Tensor:
        return torch.stack(c).mean(0)

    def federated_weighted_mean(self, c: list[Tensor], w: list[Tensor]) -> Tensor:
        pairs = zip(c, w, strict=True)
        return sum((a * b for a, b in pairs), torch.zeros(())) / sum(w)


def two_rounds(f: Any, over: Any, theta: Tensor, lr: Tensor, pace: Tensor) -> Tensor:
    """Two rounds of local descent with a server step, then the mean loss."""
    for t in (1, 2):
        start = f.broadcast(theta, over)
        models = f.federated_map("noisy_descent", start, f.broadcast(lr, over), round=t)
        weights = f.federated_map("samples", over=over)
        theta = theta + pace * (f.federated_weighted_mean(models, weights) - theta)
    return f.federated_mean(f.federated_map("residual", f.broadcast(theta, over)))


INPUTS = (vector(0.5, -1, 2), vector(0.3)[0], vector(0.9)[0])


def central(program: Program, inputs: Sequence[Tensor], count: int = 4) -> list[Tensor]:
    """Return value and gradients of the oracle."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    value = program(Central(sites(count)), None, *leaves)
    grads = torch.autograd.grad(value, leaves, allow_unused=True)
    pairs = zip(grads, leaves, strict=True)
    return [
        value.detach(),
        *(torch.zeros_like(x) if g is None else g for g, x in pairs),
    ]


def close(actual: Tensor, expected: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


# Goldens.


def test_the_tutorials_numbers() -> None:
    data = [(1.0, 2.0), (3.0, -4.0), (-7.0, 6.0)]
    places = [Site(k, vector(*x), torch.zeros(1)) for k, x in enumerate(data)]
    over = fad.Clients(InProcess(places))
    theta = vector(2, -1).requires_grad_()

    def mean_loss(point: Tensor) -> Tensor:
        values = fad.federated_map("residual", fad.broadcast(point, over))
        return fad.federated_mean(values)

    value = mean_loss(theta)
    value.backward()
    assert theta.grad is not None
    close(value.detach(), vector(87.1666667)[0], 1e-7)
    close(theta.grad, vector(57.6666667, -54.6666667), 1e-7)
    close(mean_loss(theta.detach() - 0.01 * theta.grad), vector(35.55125)[0], 1e-6)


def test_sum_and_mean_of_a_broadcast() -> None:
    over, x = clients(), vector(3.0).requires_grad_()
    (by_sum,) = torch.autograd.grad(fad.federated_sum(fad.broadcast(x, over)), x)
    (by_mean,) = torch.autograd.grad(fad.federated_mean(fad.broadcast(x, over)), x)
    assert by_sum.item() == 4 and by_mean.item() == 1


def test_softmax_weights_do_not_see_a_shift() -> None:
    over = clients()
    logits = vector(0.3, -1, 2, 0.1).requires_grad_()
    value = fad.federated_weighted_mean(
        fad.federated_map(
            "noisy_descent", *(fad.broadcast(x, over) for x in INPUTS[:2])
        ),
        fad.federated_map("share", fad.broadcast(logits, over)),
    )
    (found,) = torch.autograd.grad(value.square().sum(), logits)
    assert float(found.abs().max()) > 1e-3
    assert abs(float(found.sum())) < 1e-12


@register
def share(site: Site, logits: Tensor) -> Tensor:
    """Return the client's weight by its own logit."""
    return logits[site.id].exp()


@register
def quadratic(site: Site, theta: Tensor) -> Tensor:
    """Return 1/2 sum_j x_j^2 (theta_j - 1)^2."""
    return 0.5 * (site.x.square() * (theta - 1).square()).sum()


def test_hyper_gradient_descent_reaches_the_best_step() -> None:
    """For a frozen step the best length is known: s* = -<g, d> / <d, A d>."""
    over, theta, step = clients(), vector(0, 0, 0), vector(1, 0.3, 0.5)
    a = torch.stack([s.x.square() for s in sites()]).mean(0)
    best = (a * (1 - theta) * step).sum() / (a * step.square()).sum()
    s = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    for _ in range(300):
        value = fad.federated_mean(
            fad.federated_map("quadratic", fad.broadcast(theta + s * step, over))
        )
        (slope,) = torch.autograd.grad(value, s)
        s = (s - 0.3 * slope).detach().requires_grad_()
    close(s.detach(), best, 1e-10)


# Modes.


@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_reverse_equals_centralized_autograd(nodes: int) -> None:
    value, *grads = central(two_rounds, INPUTS)
    over = clients(nodes)
    leaves = [x.clone().requires_grad_() for x in INPUTS]
    found = two_rounds(fad, over, *leaves)
    found.backward()
    close(found.detach(), value)
    for leaf, expected in zip(leaves, grads, strict=True):
        assert leaf.grad is not None and float(expected.abs().max()) > 1e-3
        close(leaf.grad, expected)


def test_twice_over_the_same_graph_and_by_a_part_of_the_inputs() -> None:
    _, *grads = central(two_rounds, INPUTS)
    over = clients()
    theta, lr, pace = INPUTS[0], INPUTS[1].clone().requires_grad_(), INPUTS[2]
    value = two_rounds(fad, over, theta, lr, pace)
    for _ in range(2):
        (found,) = torch.autograd.grad(value, lr, retain_graph=True)
        close(found, grads[1])
    audit = over.ledger.audit()
    assert (audit.rounds, audit.derivative_rounds) == (3, 6)
    # The first round's model is no input, so only the learning rate comes back from it.
    back = [e for e in over.ledger.entries if e.derivative and e.direction == "up"]
    assert [e.bytes for e in back if e.round == 6] == [8, 8]
    assert [e.bytes for e in back if e.round == 5] == [32, 32]


def test_forward_equals_reverse_and_travels_with_the_values() -> None:
    value, *grads = central(two_rounds, INPUTS)
    tangents = (vector(0.2, -1, 0.4), vector(1.5)[0], vector(-0.7)[0])
    over = clients()
    found, slope = torch.func.jvp(
        lambda *x: two_rounds(fad, over, *x), INPUTS, tangents
    )
    close(found, value)
    close(slope, sum((g * t).sum() for g, t in zip(grads, tangents, strict=True)))
    audit = over.ledger.audit()
    assert (audit.rounds, audit.derivative_rounds, audit.closed) == (3, 0, True)
    assert audit.down == audit.up == 3 * 2


def test_several_directions_share_the_messages() -> None:
    _, *grads = central(two_rounds, INPUTS)

    def run(over: fad.Clients, hyper: Tensor) -> Tensor:
        return two_rounds(fad, over, INPUTS[0], hyper[0], hyper[1])

    hyper = torch.stack(INPUTS[1:])
    over = clients()
    jacobian = torch.func.jacfwd(lambda h: run(over, h))(hyper)
    close(jacobian, torch.stack(grads[1:]))
    plain = clients()
    run(plain, hyper)
    ours, theirs = over.ledger.audit(), plain.ledger.audit()
    assert (ours.down, ours.up) == (theirs.down, theirs.up)
    assert ours.bytes_up <= 3 * theirs.bytes_up


def test_mixed_mode_needs_no_messages_for_the_learning_rate() -> None:
    _, *grads = central(two_rounds, INPUTS)
    over = clients()

    class Mixed:
        """The federated verbs; a single number brings its columns."""

        def __getattr__(self, name: str) -> Any:
            return getattr(fad, name)

        def broadcast(self, x: Tensor, over: fad.Clients) -> fad.Placed:
            return fad.broadcast(x, over, columns=x.ndim == 0)

    lr = INPUTS[1].clone().requires_grad_()
    value = two_rounds(Mixed(), over, INPUTS[0], lr, INPUTS[2])
    close(torch.autograd.grad(value, lr)[0], grads[1])
    # The last two sums pull back to their models; the first has only the learning rate.
    audit = over.ledger.audit()
    assert (audit.derivative_rounds, audit.closed) == (2, True)
    leaves = [x.clone().requires_grad_() for x in INPUTS]
    value = two_rounds(Mixed(), over, *leaves)
    for found, expected in zip(torch.autograd.grad(value, leaves), grads, strict=True):
        close(found, expected)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_central_differences(place: int) -> None:
    leaves = [x.clone().requires_grad_() for x in INPUTS]
    two_rounds(fad, clients(), *leaves).backward()
    direction, h = torch.ones_like(INPUTS[place]), 1e-5

    def at(shift: float) -> Tensor:
        moved = list(INPUTS)
        moved[place] = moved[place] + shift * direction
        return two_rounds(fad, clients(), *moved)

    gradient = leaves[place].grad
    assert gradient is not None
    close(gradient.sum(), (at(h) - at(-h)) / (2 * h), 1e-8)


def test_torch_func_grad_over_a_program() -> None:
    _, *grads = central(two_rounds, INPUTS)
    over = clients()
    found = torch.func.grad(lambda lr: two_rounds(fad, over, INPUTS[0], lr, INPUTS[2]))
    close(found(INPUTS[1]), grads[1])


def test_second_derivatives_are_refused() -> None:
    over, x = clients(), INPUTS[0].clone().requires_grad_()
    value = fad.federated_mean(fad.federated_map("residual", fad.broadcast(x, over)))
    (slope,) = torch.autograd.grad(value, x, create_graph=True)
    with pytest.raises(NotImplementedError, match="once"):
        slope.sum().backward()


# The adjoint test: <JVP v, u> = <v, VJP u>, on each verb and on programs drawn at random.


def vectors_to_vector(op: str) -> Callable[..., Tensor]:
    def run(f: Any, over: Any, x: Tensor) -> Tensor:
        c = f.broadcast(x, over)
        if op == "map":
            c = f.federated_map("mix", c, c)
        if op == "weighted":
            w = f.federated_map("size", c)
            found: Tensor = f.federated_weighted_mean(c, w)
            return found
        if op == "mean":
            return f.federated_mean(c)  # type: ignore[no-any-return]
        return f.federated_sum(c)  # type: ignore[no-any-return]

    return run


def adjoint(program: Program, x: Tensor, seed: int = 0) -> None:
    """Compare forward and reverse mode, and both with the oracle."""
    random = torch.Generator().manual_seed(seed)
    v = torch.randn(x.shape, generator=random, dtype=x.dtype)
    over = clients()
    y, pushed = torch.func.jvp(lambda z: program(fad, over, z), (x,), (v,))
    u = torch.randn(y.shape, generator=random, dtype=x.dtype)
    leaf = x.clone().requires_grad_()
    pulled: Tensor | None = None
    found = program(fad, over, leaf)
    if found.requires_grad:
        (pulled,) = torch.autograd.grad(found, leaf, u, allow_unused=True)
    pulled = torch.zeros_like(x) if pulled is None else pulled
    scale = float(pushed.abs().max() + pulled.abs().max()) + 1
    close((pushed * u).sum(), (v * pulled).sum(), 1e-10 * scale)
    twin = x.clone().requires_grad_()
    expected = program(Central(sites()), None, twin)
    close(y, expected.detach(), 1e-10 * scale)
    if expected.requires_grad:
        (truth,) = torch.autograd.grad(expected, twin, u, allow_unused=True)
        close(pulled, torch.zeros_like(x) if truth is None else truth, 1e-10 * scale)
    assert over.ledger.audit().closed


@pytest.mark.parametrize("op", ["sum", "mean", "map", "weighted"])
def test_adjoint_of_each_verb(op: str) -> None:
    adjoint(vectors_to_vector(op), INPUTS[0])


@dataclass
class Random:
    """A program drawn at random: each step appends a value on the server or on the clients."""

    steps: list[tuple[str, int, int]] = field(default_factory=list)

    def __call__(self, f: Any, over: Any, x: Tensor) -> Tensor:
        server, placed = [x], [f.broadcast(x, over)]
        for kind, i, j in self.steps:
            a, b = placed[i % len(placed)], placed[j % len(placed)]
            if kind == "broadcast":
                placed.append(f.broadcast(server[i % len(server)], over))
            elif kind == "map":
                placed.append(f.federated_map("mix", a, b))
            elif kind == "mean":
                server.append(f.federated_mean(a))
            elif kind == "sum":
                server.append(torch.tanh(f.federated_sum(a)))
            elif kind == "weighted":
                w = f.federated_map("size", b)
                server.append(f.federated_weighted_mean(a, w))
            else:
                pair = server[i % len(server)], server[j % len(server)]
                server.append(torch.cos(pair[0]) * pair[1])
        return server[-1] + f.federated_mean(placed[-1])  # type: ignore[no-any-return]


KINDS = ["broadcast", "map", "mean", "sum", "weighted", "server"]


@settings(max_examples=25)
@given(
    st.lists(
        st.tuples(st.sampled_from(KINDS), st.integers(0, 9), st.integers(0, 9)),
        max_size=8,
    ),
    st.integers(0, 2**31),
)
def test_adjoint_of_random_programs(
    steps: list[tuple[str, int, int]], seed: int
) -> None:
    adjoint(Random(steps), INPUTS[0], seed)


# Ledger.


def test_the_ledger_counts_as_the_theory_says() -> None:
    over = clients(nodes=2)
    leaves = [x.clone().requires_grad_() for x in INPUTS]
    value = two_rounds(fad, over, *leaves)
    before = over.ledger.audit()
    assert (before.rounds, before.down, before.up) == (3, 6, 6)
    # Theta and lr twice, theta once; the models with their weights twice, the loss once.
    assert before.bytes_down == 2 * 8 * (4 + 4 + 3)
    assert before.bytes_up == 2 * 8 * (4 + 4 + 1)
    assert not before.derivative
    value.backward()
    after = over.ledger.audit()
    assert (after.rounds, after.derivative_rounds) == (3, 3)
    assert (after.down, after.up) == (2 * before.down, 2 * before.up)
    assert after.program == after.derivative == {"broadcast", "sum"}
    assert after.closed and not after.foreign
    # What is pulled back has the shapes of what was broadcast, what is pushed down of sums.
    back = [e for e in over.ledger.entries if e.derivative]
    assert sum(e.bytes for e in back if e.direction == "up") == 2 * 8 * (3 + 4 + 4)
    assert after.alone == 0


def test_a_node_with_one_client_is_told_by_the_audit() -> None:
    over = clients(nodes=2, count=3)
    fad.federated_mean(fad.federated_map("residual", fad.broadcast(INPUTS[0], over)))
    assert over.ledger.audit().alone == 1


def test_an_answer_without_numbers_is_a_message() -> None:
    over = clients(nodes=2)
    values = fad.broadcast(vector(1, 2), over)  # of a length that fits no client
    with pytest.raises(fad.Dropped, match="nobody answered"):
        fad.federated_sum(fad.federated_map("residual", values))
    audit = over.ledger.audit()
    assert (audit.down, audit.up, audit.bytes_up) == (2, 2, 0)


def test_a_cohort_is_somebody() -> None:
    with pytest.raises(ValueError, match="at least one"):
        clients().only([])


def test_an_output_that_nobody_uses_costs_no_message() -> None:
    over, x = clients(), INPUTS[0].clone().requires_grad_()
    fad.federated_sum(fad.broadcast(x, over))
    c = fad.federated_map("residual", fad.broadcast(x.detach(), over))
    value = fad.federated_mean(c) + x.sum()
    value.backward()
    assert over.ledger.audit().derivative_rounds == 0


def test_values_without_the_input_have_gradient_zero() -> None:
    over, x = clients(), INPUTS[0].clone().requires_grad_()
    c = fad.federated_map(
        "first_only", fad.broadcast(x.detach(), over), fad.broadcast(x, over)
    )
    (found,) = torch.autograd.grad(fad.federated_sum(c), x)
    close(found, torch.zeros(3, dtype=torch.float64))


@register
def first_only(site: Site, a: Tensor, b: Tensor) -> Tensor:
    """Ignore one of the arguments."""
    return a.sum()


# Partial participation.


@dataclass(frozen=True)
class Fragile(InProcess):
    """Clients that fail in some exchanges: (number of the exchange, client)."""

    failures: frozenset[tuple[int, int]] = frozenset()
    asked: list[int] = field(default_factory=list)

    def ask(self, question: Question) -> list[tuple[int, Question, Answer]]:
        self.asked.append(1)
        gone = {k for n, k in self.failures if n == len(self.asked)}
        left = [s for s in self.sites if s.id not in gone]
        return InProcess(left, self.nodes).ask(question)


def one_round(f: Any, over: Any, theta: Tensor, lr: Tensor) -> Tensor:
    pair = f.broadcast(theta, over), f.broadcast(lr, over)
    models = f.federated_map("noisy_descent", *pair)
    mean: Tensor = f.federated_weighted_mean(
        models, f.federated_map("samples", over=over)
    )
    return mean.square().sum()


def of(keep: Sequence[int]) -> list[Tensor]:
    """Return value and gradients of the oracle with some of the clients."""
    leaves = [x.clone().requires_grad_() for x in INPUTS[:2]]
    value = one_round(Central([sites()[k] for k in keep]), None, *leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def fragile(*failures: tuple[int, int]) -> fad.Clients:
    return fad.Clients(Fragile(sites(), 2, frozenset(failures)))


def test_the_derivative_is_of_the_clients_that_answered() -> None:
    value, grads, over = fad.value_and_grad(
        lambda c, *x: one_round(fad, c, *x), fragile((1, 2)), *INPUTS[:2]
    )
    expected = of([0, 1, 3])
    close(value, expected[0])
    for found, truth in zip(grads, expected[1:], strict=True):
        close(found, truth)
    assert over.cohort == (0, 1, 2, 3)


def test_a_client_that_drops_on_the_way_back_is_an_error() -> None:
    lr = INPUTS[1].clone().requires_grad_()
    value = one_round(fad, fragile((2, 1)), INPUTS[0], lr)
    with pytest.raises(
        fad.Dropped, match="clients 1: in the value, but not in its deriv"
    ):
        value.backward()
    with pytest.raises(fad.Dropped):
        program = lambda c, *x: one_round(fad, c, *x)  # noqa: E731
        fad.value_and_grad(program, fragile((2, 1)), *INPUTS[:2])


def test_nodes_whose_values_differ_in_shape_are_no_sum() -> None:
    found = sites()
    found[1] = replace(found[1], x=vector(1, 2))  # the only client of the second node
    over = fad.Clients(InProcess([found[0], found[1], found[2]], nodes=2))
    with pytest.raises(ValueError, match="y0: nodes return different shapes"):
        fad.federated_sum(fad.federated_map("own", over=over))


def test_or_is_removed_from_both() -> None:
    value, grads, over = fad.value_and_grad(
        lambda c, *x: one_round(fad, c, *x),
        fragile((2, 1), (4, 3)),
        *INPUTS[:2],
        dropped="remove",
    )
    expected = of([0, 2])
    assert over.cohort == (0, 2)
    close(value, expected[0])
    for found, truth in zip(grads, expected[1:], strict=True):
        close(found, truth)


def test_a_client_that_fails_is_left_out_and_why_is_told() -> None:
    over = clients()

    @register
    def touchy(site: Site, x: Tensor) -> Tensor:
        if site.id == 1:
            raise RuntimeError("no battery")
        return x / 0 if site.id == 2 else x

    total = fad.federated_sum(
        fad.federated_map("touchy", fad.broadcast(INPUTS[0], over))
    )
    close(total, 2 * INPUTS[0])
    c = fad.federated_map("touchy", fad.broadcast(INPUTS[0], over))
    close(fad.federated_mean(c), INPUTS[0])
    with pytest.raises(fad.Dropped, match=r"clients 1: nobody answered.*no battery"):
        only = over.only([1])
        fad.federated_sum(fad.federated_map("touchy", fad.broadcast(INPUTS[0], only)))


# Mistakes.


def test_mistakes_are_told() -> None:
    over, other = clients(), clients()

    def loss(site: Site) -> Tensor:
        return site.x

    with pytest.raises(ValueError, match=r"'loss' is registered already, by strateg"):
        register(loss)
    with pytest.raises(TypeError, match="float32 or float64"):
        fad.broadcast(torch.tensor([1]), over)
    with pytest.raises(ValueError, match="same clients"):
        fad.federated_map(
            "mix", fad.broadcast(INPUTS[0], over), fad.broadcast(INPUTS[0], other)
        )
    with pytest.raises(ValueError, match="over=clients"):
        fad.federated_map("samples")
    with pytest.raises(fad.Dropped, match="KeyError: 'nothing'"):
        fad.federated_sum(fad.federated_map("nothing", over=over))
    with pytest.raises(fad.Dropped, match="no model"):
        fad.federated_sum(fad.federated_map("loss", fad.broadcast(INPUTS[0], over)))


@pytest.mark.parametrize(
    ("calls", "outputs", "why"),
    [
        (["mix@1 0 1"], [1], "not there yet"),
        (["mix@1 0 0"], [5], "no value of the plan"),
        (["os.system@1 0"], [1], "no function is registered"),
        (["__import__('os')@1"], [1], "cannot read"),
        (["mix@1 0 0"] * 300, [1], "300 calls"),
        ([], [], "0 outputs"),
    ],
)
def test_a_bad_plan_is_refused(calls: list[str], outputs: list[int], why: str) -> None:
    with pytest.raises(BadPlan, match=why):
        Plan.parse(1, calls, outputs)


def test_a_plan_travels_as_text() -> None:
    plan = Plan(2, (Call("mix", 3, (0, 1)), Call("size", 1, (2,))), (3, 2))
    assert Plan.parse(2, [c.text() for c in plan.calls], plan.outputs) == plan
