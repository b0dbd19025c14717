"""Layers that stay pure functions under torch.func: dropout and an LSTM.

torch's own dropout draws from a hidden generator, so that a result would depend on
which client ran first. Its LSTM is one fused operation without a batching rule or a
second derivative. The two here are written with ordinary operations, so that vmap, grad
and Hessian products pass through.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from app.errors import UserError


class Dropout(nn.Module):
    """Dropout whose random numbers come from outside.

    In training it reads the buffer ``noise``: uniform numbers in [0, 1) of shape (n,
    *feature_shape), which the caller supplies with each call of
    `torch.func.functional_call` under the names that `noise_shapes` tells. In
    evaluation it does nothing.

    Parameters
    ----------
    p : float
        Probability of dropping, in [0, 1).
    channelwise : bool
        Drop whole channels: one random number for each, as `torch.nn.Dropout2d`.

    Attributes
    ----------
    feature_shape : tuple[int, ...] or None
        Shape of the noise of one sample, once `probe` has recorded it.
    """

    noise: Tensor

    def __init__(self, p: float, channelwise: bool = False) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise UserError(f"dropout={p}: a probability in [0, 1) is needed.")
        self.p = p
        self.channelwise = channelwise
        self.feature_shape: tuple[int, ...] | None = None
        # Not persistent: the noise of one batch has no place in a checkpoint.
        self.register_buffer("noise", torch.empty(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Drop and rescale, so that the expectation stays x."""
        if not self.training or self.p == 0:
            return x
        if self.feature_shape is None or self.noise.shape != (
            len(x),
            *self.feature_shape,
        ):
            raise RuntimeError(
                f"Dropout needs noise of shape (n, *feature_shape) for n={len(x)}, "
                f"feature_shape={self.feature_shape}; it got {tuple(self.noise.shape)}"
            )
        return x * (self.noise >= self.p) / (1 - self.p)

    def extra_repr(self) -> str:
        """Tell the parameters when printed."""
        return f"p={self.p}, channelwise={self.channelwise}"


class LSTM(nn.Module):
    """One LSTM layer: (n, steps, inputs) to (n, steps, width), starting from zeros.

    The same equations, parameter shapes, order of gates (input, forget, cell, output)
    and initialisation as `torch.nn.LSTM` with one layer and ``batch_first``.

    Parameters
    ----------
    inputs : int
        Numbers in one step.
    width : int
        Size of the state.
    """

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.weight_ih = nn.Parameter(torch.empty(4 * width, inputs))
        self.weight_hh = nn.Parameter(torch.empty(4 * width, width))
        self.bias_ih = nn.Parameter(torch.empty(4 * width))
        self.bias_hh = nn.Parameter(torch.empty(4 * width))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -1 / math.sqrt(width), 1 / math.sqrt(width))

    def forward(self, x: Tensor) -> Tensor:
        """Run over the steps."""
        # One product for the inputs of all steps; only the state must wait its turn.
        driven = functional.linear(x, self.weight_ih, self.bias_ih + self.bias_hh)
        hidden = torch.zeros_like(driven[:, 0, : self.weight_hh.shape[1]])
        cell = hidden
        states = []
        for step in driven.unbind(1):
            gates = step + functional.linear(hidden, self.weight_hh)
            enter, forget, update, leave = gates.chunk(4, -1)
            cell = forget.sigmoid() * cell + enter.sigmoid() * update.tanh()
            hidden = leave.sigmoid() * cell.tanh()
            states.append(hidden)
        return torch.stack(states, 1)


class LastStep(nn.Module):
    """Keeps the last step of a sequence: (n, steps, width) to (n, width)."""

    def forward(self, x: Tensor) -> Tensor:
        """Select the step."""
        return x[:, -1]


class Scalar(nn.Module):
    """Turns (n, 1) into the (n,) that a regression target is."""

    def forward(self, x: Tensor) -> Tensor:
        """Drop the last axis."""
        return x.squeeze(-1)


def probe(model: nn.Module, input_shape: tuple[int, ...], vocabulary: int = 0) -> None:
    """Send one sample of zeros through a model, so that each Dropout learns its shape.

    Parameters
    ----------
    model : nn.Module
        Any module; its mode is the same afterwards.
    input_shape : tuple[int, ...]
        Shape of one sample.
    vocabulary : int
        More than 0 if samples are character numbers (int64).

    Raises
    ------
    UserError
        If the model does not take samples of this shape.
    """

    def record(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, Dropout)
        shape = tuple(inputs[0].shape[1:])
        if layer.channelwise:
            shape = shape[:1] + (1,) * (len(shape) - 1)
        layer.feature_shape = shape

    drops = [layer for layer in model.modules() if isinstance(layer, Dropout)]
    hooks = [layer.register_forward_pre_hook(record) for layer in drops]
    parameter = next(model.parameters(), torch.empty(0))
    dtype = torch.int64 if vocabulary else parameter.dtype
    sample = torch.zeros(1, *input_shape, dtype=dtype, device=parameter.device)
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(sample)
    except (RuntimeError, ValueError, IndexError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"the model does not take samples of shape {input_shape}: {reason}"
        ) from error
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()


def noise_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name the noise that training a model needs.

    Parameters
    ----------
    model : nn.Module
        A model that `probe` has seen.

    Returns
    -------
    dict[str, tuple[int, ...]]
        Buffer name, as `torch.func.functional_call` takes it, to the shape for one
        sample.

    Raises
    ------
    RuntimeError
        If the model was not probed.
    """
    shapes = {}
    for name, layer in model.named_modules():
        if isinstance(layer, Dropout) and layer.p > 0:
            if layer.feature_shape is None:
                raise RuntimeError(f"probe the model first: {name} has no shape yet")
            shapes[f"{name}.noise" if name else "noise"] = layer.feature_shape
    return shapes
