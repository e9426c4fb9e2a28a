"""The training losses: conditional flow matching, denoising score matching, and the regression that both are cases of.

Each takes a field, a path and the draws (z, eps, t). It returns one loss per sample, of shape (B,), averaged over the
dimensions of a sample.

References:
    Lipman et al. 2023, "Flow Matching for Generative Modeling", https://arxiv.org/abs/2210.02747
    Vincent 2011, "A Connection Between Score Matching and Denoising Autoencoders", Neural Computation 23(7)
    Song & Ermon 2019, "Generative Modeling by Estimating Gradients", https://arxiv.org/abs/1907.05600
"""

from torch import Tensor

from fmlit.core.tensors import Field, check_like, expand_time
from fmlit.flows.paths import GaussianPath
from fmlit.flows.predictions import Prediction, Velocity


def flow_matching_loss(
    velocity: Field, path: GaussianPath, z: Tensor, eps: Tensor, t: Tensor, weight: Tensor | None = None
) -> Tensor:
    """Conditional flow matching: ``w(t) |u_theta(x_t, t) - u_t(x_t | z)|^2`` with ``x_t = alpha z + beta eps``.

    The gradient is the same as that of a regression on the marginal velocity, which is never needed (Lipman et al.
    2023, theorem 2).

    Args:
        velocity: the field u_theta, (x (B, *shape), t (B,)) -> (B, *shape).
        path: the Gaussian path.
        z: data, (B, *shape).
        eps: noise, (B, *shape).
        t: times, (B,).
        weight: w(t), (B,), or None for 1.

    Returns:
        The loss of each sample, (B,).

    Raises:
        UserError: the shapes do not match.
    """
    return prediction_loss(velocity, Velocity(), path, z, eps, t, weight)


def score_matching_loss(
    score: Field, path: GaussianPath, z: Tensor, eps: Tensor, t: Tensor, weight: Tensor | None = None
) -> Tensor:
    """Denoising score matching: ``w(t) beta^2 |s_theta(x_t, t) + eps / beta|^2``.

    It is computed as ``w(t) |beta s_theta + eps|^2``, which stays finite at beta = 0.

    Without the factor ``beta^2``, the loss would grow like ``1 / beta^2``, and times near the data would dominate all
    others. With it, every time has the same scale (Song & Ermon 2019, section 4.2). For ``s = -eps_theta / beta`` this
    is DDPM's loss ``|eps_theta - eps|^2``.

    Args:
        score: the field s_theta, (x (B, *shape), t (B,)) -> (B, *shape).
        path: the Gaussian path.
        z: data, (B, *shape).
        eps: noise, (B, *shape).
        t: times, (B,).
        weight: w(t), (B,), or None for 1.

    Returns:
        The loss of each sample, (B,).

    Raises:
        UserError: the shapes do not match.
    """
    s = score(path.sample(z, eps, t), t)
    check_like(s, eps, "the score and eps")
    return _weighted_mean_square(expand_time(path.beta(t), eps) * s + eps, weight)


def prediction_loss(
    network: Field,
    prediction: Prediction,
    path: GaussianPath,
    z: Tensor,
    eps: Tensor,
    t: Tensor,
    weight: Tensor | None = None,
) -> Tensor:
    """Regression on the prediction itself: ``w(t) |F(x_t, t) - target|^2``. Every module trains with this loss.

    With ``prediction.flow_matching_weight(path, t)`` it is the conditional flow matching loss, and with
    ``prediction.score_matching_weight(path, t)`` the denoising score matching loss. Both weights are bounded, so that
    the loss of every prediction is finite and no time dominates it.

    Args:
        network: the output F at a point of the path, (x (B, *shape), t (B,)) -> (B, *shape).
        prediction: what F predicts.
        path: the Gaussian path.
        z: data, (B, *shape).
        eps: noise, (B, *shape).
        t: times, (B,).
        weight: w(t), (B,), or None for 1.

    Returns:
        The loss of each sample, (B,).

    Raises:
        UserError: the shapes do not match.
    """
    output = network(path.sample(z, eps, t), t)
    check_like(output, z, "the output and z")
    return _weighted_mean_square(output - prediction.target(path, z, eps, t), weight)


def _weighted_mean_square(residual: Tensor, weight: Tensor | None) -> Tensor:
    loss = residual.square().flatten(1).mean(1)
    if weight is None:
        return loss
    check_like(weight, loss, "weight and t")
    return weight * loss
