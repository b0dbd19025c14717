"""FedEM: K learners, mixed by each client in its own proportions (Marfoq et al. 2021, NeurIPS).

Algorithm 1 of arXiv 2108.10252:

    client t:  q_i(k) ~ pi_t(k) exp(-l(theta_k; x_i, y_i))       for all its training samples (E)
               pi_t(k) <- mean_i q_i(k)                                                       (M)
               theta_k by SGD steps on  mean_i q_i(k) l(theta_k; x_i, y_i)                    (M)
    server:    theta_k <- theta_k + server_lr * sum_t n_t (theta_k,t - theta_k) / sum_t n_t
    predicts:  sum_k pi_t(k) softmax(logits of learner k)

pi_t stays with the client. One thing is not as printed: q is taken anew at every local step, where
the paper keeps that of the round's start; the steps then descend on -log sum_k pi_t(k) exp(-l_k),
whose gradient at the start is the paper's, and the state does not grow with the samples. pi_t is
that of the round's start in them. A client makes pi_t anew from the learners that it receives when
it is judged. With equal learners every pi stays 1/K: they start from different draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from strategies.algorithm import Client, Net, Vectors
from strategies.fedavg import FedAvg
from strategies.individual import Seen


@dataclass(frozen=True)
class FedEM(FedAvg):
    """Mixtures of shared learners, by expectation and maximization.

    Attributes
    ----------
    learners : int
        K.
    """

    learners: Annotated[int, Ge(2)] = 3

    def fresh(self, theta: Tensor) -> Vectors:
        """Return pi = 1/K."""
        return {"pi": theta.new_full((self.learners,), 1 / self.learners)}

    def candidates(self, down: Mapping[str, Tensor]) -> Tensor:
        """Return the K learners."""
        return down["theta"].view(self.learners, -1)

    def survey(self, memory: Vectors, losses: Tensor) -> Vectors:
        """Take the E step and the M step of pi."""
        q = (_log(memory["pi"])[:, None] - losses).softmax(0)
        return {**memory, "pi": q.mean(1), "prior": memory["pi"]}

    def begin(
        self, down: Mapping[str, Tensor], memory: Vectors, client: Client
    ) -> Vectors:
        """Hold pi before and after."""
        return {"pi": memory["pi"], "prior": memory["prior"]}

    def cost(self, batch: Seen, theta: Tensor, state: Vectors) -> Tensor:
        """Return -log sum_k pi_k exp(-l_k) of each sample."""
        models = theta.view(self.learners, -1).unbind()
        losses = torch.stack([batch.losses(batch.outputs(m)) for m in models])
        return -(_log(state["prior"])[:, None] - losses).logsumexp(0)

    def finish(
        self, theta: Tensor, anchor: Tensor, state: Vectors, effort: Tensor
    ) -> tuple[Vectors, Vectors]:
        """Return the learners' differences; remember pi."""
        return {"delta": theta - anchor}, {"pi": state["pi"]}

    def predict(
        self, net: Net, down: Mapping[str, Tensor], memory: Vectors, x: Tensor
    ) -> Tensor:
        """Return log-probabilities of the mixture."""
        models = self.candidates(down).unbind()
        logs = torch.stack([net(m, x).log_softmax(-1) for m in models])
        pi = _log(memory["pi"]).view(-1, *[1] * (logs.ndim - 1))
        return (logs + pi).logsumexp(0)


def _log(pi: Tensor) -> Tensor:
    """Return log pi, of a zero the least number: its learner may come back."""
    return pi.clamp(min=torch.finfo(pi.dtype).tiny).log()
