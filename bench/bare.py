"""No framework at all: FedAvg written out in PyTorch, the clients spread over two processes.

`loop` trains client after client with modules and `torch.optim.SGD`; `vmap` trains a process's
clients at once. Nothing is checked, recorded, remembered or sent: the limit of a simulator.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional as F

from app.config import Config, load
from app.host import objective, setting
from bench.workloads import ALL

PROCESSES = 2


def timed(name: str, how: str, rounds: int) -> dict[str, Any]:
    """Train a workload and return the seconds of each round and the final accuracy."""
    overrides = tuple(ALL[name].overrides)
    config, here = load(overrides), setting(overrides)
    module = objective(config, here.dataset).module
    theta = nn.utils.parameters_to_vector(module.parameters()).detach().share_memory_()
    sums = torch.zeros(PROCESSES, len(theta)).share_memory_()
    context = mp.get_context("spawn")
    barrier, seconds = context.Barrier(PROCESSES), context.Queue()
    given = (name, how, rounds, theta, sums, barrier, seconds)
    workers = [
        context.Process(target=_work, args=(rank, *given)) for rank in range(PROCESSES)
    ]
    for worker in workers:
        worker.start()
    times = seconds.get()
    for worker in workers:
        worker.join()
    nn.utils.vector_to_parameters(theta, module.parameters())
    module.eval()
    test = here.dataset.test
    with torch.no_grad():
        hits = (module(test.x).argmax(-1) == test.y).double().mean()
    return {"seconds": times, "accuracy": float(hits)}


def _work(
    rank: int,
    name: str,
    how: str,
    rounds: int,
    theta: Tensor,
    sums: Tensor,
    barrier: Any,
    seconds: Any,
) -> None:
    """Train this process's share of each round's cohort."""
    torch.set_num_threads(1)
    overrides = tuple(ALL[name].overrides)
    config, here = load(overrides), setting(overrides)
    module = objective(config, here.dataset).module
    module.train()
    x, y = here.dataset.train.x, here.dataset.train.y
    rows = [torch.from_numpy(part) for part in here.parts]
    lr, times = ALL[name].lr, []
    train = _loop if how == "loop" else _vmap
    for round_ in range(rounds):
        began = time.perf_counter()
        torch.manual_seed(round_)
        cohort = torch.randperm(config.clients)[: config.clients_per_round].tolist()
        mine = [rows[k] for k in cohort[rank::PROCESSES]]
        sums[rank] = train(module, theta, x, y, mine, config, lr)
        barrier.wait()
        if rank == 0:
            theta.copy_(sums.sum(0) / len(cohort))
        barrier.wait()
        times.append(time.perf_counter() - began)
    if rank == 0:
        seconds.put(times)


def _loop(
    module: nn.Module,
    theta: Tensor,
    x: Tensor,
    y: Tensor,
    clients: list[Tensor],
    config: Config,
    lr: float,
) -> Tensor:
    """Return the sum of the models of some clients, trained one after another."""
    total = torch.zeros_like(theta)
    for rows in clients:
        with torch.no_grad():
            nn.utils.vector_to_parameters(theta.clone(), module.parameters())
        optimizer = torch.optim.SGD(module.parameters(), lr=lr)
        for _ in range(config.local.epochs):
            for part in torch.split(torch.randperm(len(rows)), config.local.batch):
                batch = rows[part]
                optimizer.zero_grad()
                outputs = module(x.index_select(0, batch))
                F.cross_entropy(outputs, y.index_select(0, batch)).backward()
                optimizer.step()
        total += nn.utils.parameters_to_vector(module.parameters()).detach()
    return total


def _vmap(
    module: nn.Module,
    theta: Tensor,
    x: Tensor,
    y: Tensor,
    clients: list[Tensor],
    config: Config,
    lr: float,
) -> Tensor:
    """Return the sum of the models of some clients with equally many samples, trained at once."""
    start = {n: p.detach() for n, p in module.named_parameters()}
    sizes = [p.numel() for p in start.values()]
    pieces = torch.split(theta, sizes)
    stack = {
        n: piece.view(p.shape).expand(len(clients), *p.shape)
        for (n, p), piece in zip(start.items(), pieces, strict=True)
    }

    def loss(parameters: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        outputs = torch.func.functional_call(module, parameters, (inputs,))
        return F.cross_entropy(outputs, targets)

    gradient = torch.func.vmap(torch.func.grad(loss))
    index = torch.stack(clients)
    for _ in range(config.local.epochs):
        order = torch.rand(index.shape).argsort(1)
        for part in torch.split(index.gather(1, order), config.local.batch, dim=1):
            flat = part.reshape(-1)
            inputs = x.index_select(0, flat).view(*part.shape, *x.shape[1:])
            grads = gradient(stack, inputs, y.index_select(0, flat).view(part.shape))
            stack = {n: torch.sub(p, grads[n], alpha=lr) for n, p in stack.items()}
    return torch.cat([p.sum(0).reshape(-1) for p in stack.values()])
