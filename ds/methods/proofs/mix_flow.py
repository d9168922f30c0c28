"""The proof of MixFlow."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from ds.methods.flow.path import straightness
from ds.methods.proof import NORMAL, Check, Formula, exact, normal_pairs


def measure(method: Any, net: nn.Module, z: Tensor) -> tuple[Check, ...]:
    """Check that paths are straighter than those of the plain flow, the control."""
    return (Check("straightness", straightness(method.result(net).denoiser, z), share=0.35),)


def identity(method: Any) -> tuple[Check, ...]:
    """Check sources and their divergence, with predictors and velocities that are formulas."""
    return _divergence(method), _plain(method), _straight(method), _gradient(method)


def _predicting(mean: Tensor, log_var: Tensor) -> Formula:
    return Formula(lambda x0, t: torch.cat([mean, log_var.expand_as(mean)], 1))


def _divergence(method: Any) -> Check:
    """The divergence is that of torch.distributions."""
    pairs, noise = normal_pairs(), Normal(0.0, 1.0)
    mean, log_var = pairs.noise, pairs.x0.sin()
    own = Normal(mean, (log_var / 2).exp())
    found = method.mixed(_predicting(mean, log_var), pairs, pairs.x0[:, 0])[1]

    def apart(from_, to) -> Tensor:
        return found - kl_divergence(from_, to).sum(1)

    wide = Normal(mean, log_var.exp())
    wrong = {"other_way_round": apart(noise, own), "variance_for_deviation": apart(wide, noise)}
    return exact("divergence of a source", apart(own, noise), **wrong)


def _plain(method: Any) -> Check:
    """With w = 0 for all rows, the error is that of the plain flow."""
    pairs, net = normal_pairs(), Formula(lambda x, told: x.sin())
    plain = method.flow.errors(net, pairs)[0]

    def apart(w: float) -> Tensor:
        share = pairs.x0.new_full((len(pairs.x0),), w)
        own = _predicting(pairs.x0.sin(), pairs.x0.cos())
        return method.flow.errors(net, method.mixed(own, pairs, share)[0])[0] - plain

    return exact("w = 0 is the plain flow", apart(0.0), w_a_half=apart(0.5), w_one=apart(1.0))


def _straight(method: Any) -> Check:
    """Sources from which the data's own ODE starts make straight paths, known exactly."""
    pairs = normal_pairs()._replace(noise=normal_pairs().noise.roll(5, 0))
    starts = (pairs.x0 - NORMAL.mean) / NORMAL.std

    def straight(x: Tensor, told: Tensor) -> Tensor:
        t = told[:, None] / method.time_scale
        start = (x - (1 - t) * NORMAL.mean) / ((1 - t) * NORMAL.std + t)
        return start - NORMAL.endpoint(start, 0, 1)

    def error(starts: Tensor = starts, log_var: float = -1e4, w: float = 1.0) -> Tensor:
        own = _predicting(starts, starts.new_full((), log_var))
        mixed = method.mixed(own, pairs, starts.new_full((len(starts),), w))[0]
        return method.flow.errors(Formula(straight), mixed)[0]

    return exact(
        "error on straight sources",
        error(),
        another_row=error(starts.roll(1, 0)),
        with_a_variance=error(log_var=0.0),
        half_of_it_noise=error(w=0.5),
        plain_flow=error(w=0.0),
    )


def _gradient(method: Any) -> Check:
    """The predictor's gradient comes through the state and through the target."""
    pairs = normal_pairs()
    w = torch.linspace(0.1, 0.9, len(pairs.x0), dtype=torch.float64, device="cpu")
    mean, log_var = pairs.x0.sin(), pairs.x0.cos()
    own = torch.cat([mean, log_var], 1).requires_grad_()
    states: list[Tensor] = []

    def velocity(x: Tensor, told: Tensor) -> Tensor:
        states.extend([x.detach(), told[:, None] / method.time_scale])
        return x.sin()

    mixed = method.mixed(Formula(lambda x0, t: own), pairs, w)[0]
    with torch.enable_grad():
        (found,) = torch.autograd.grad(method.flow.errors(Formula(velocity), mixed)[0].sum(), own)
    x, t = states
    var, w = log_var.exp(), w[:, None]
    spread = 0.5 * pairs.noise * w * var / (w * var + 1 - w).sqrt()
    by_source = torch.cat([w.expand_as(mean), spread], 1)  # derivatives of the source

    def apart(of_source: Tensor) -> Tensor:
        return found - of_source.repeat(1, 2) * by_source

    through_state = t * x.cos()
    return exact(
        "gradient of the predictor",
        apart(through_state - 1),
        through_the_state_alone=apart(through_state),
        through_the_target_alone=apart(-torch.ones_like(x)),
    )
