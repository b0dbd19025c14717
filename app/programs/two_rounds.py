"""How the loss after two rounds of federated averaging depends on the clients' learning rate."""

import torch
from torch import Tensor

from strategies.fad import (
    Clients,
    Site,
    broadcast,
    federated_map,
    federated_mean,
    federated_weighted_mean,
    register,
)


@register
def descend(site: Site, theta: Tensor, lr: Tensor) -> Tensor:
    """Take three gradient steps on the client's own samples."""
    for _ in range(3):
        theta = theta - lr * torch.func.grad(site.loss)(theta)
    return theta


def program(clients: Clients, theta: Tensor) -> None:
    """Print the loss after two rounds, and its derivative by the learning rate."""
    lr = torch.tensor(0.1, dtype=theta.dtype, requires_grad=True)
    for _ in range(2):
        given = broadcast(theta, clients), broadcast(lr, clients)
        models = federated_map("descend", *given)
        weights = federated_map("samples", over=clients)
        theta = federated_weighted_mean(models, weights)
    loss = federated_mean(federated_map("loss", broadcast(theta, clients)))
    torch.autograd.backward(loss)
    print(f"loss {loss.detach():.12f}, its derivative by lr {lr.grad:.12f}")
