r"""Client-level DP by output perturbation: a site clips and noises its whole update before it leaves.

    u = clip_S(after - before) + N(0, (sigma * 2 S)^2 I)

What is protected is a client's **whole dataset**: replacing it by any other of the same public size moves the clipped
update by at most 2 S in L2, so ``sigma`` (the noise multiplier) is the ratio of noise to that sensitivity and a round
is one Gaussian mechanism (Dwork and Roth 2014, appendix A) in which every client takes part: no amplification by
sampling is claimed. Rounds compose in the domain's filter like any other charge. Neither the server nor another client
sees anything un-noised (unlike central DP-FedAvg, McMahan et al. 2018, arXiv 1710.06963).

The price: the noise has norm about 2 sigma S sqrt(d) over d trained parameters, the update at most S.
``hopeless_at_client_level`` says it with the study's numbers.
"""

import math
from typing import Any

from fedmentor_core.adapters.lora import State
from fedmentor_core.privacy.entropy import secret_generator
from fedmentor_core.records import DomainPlan

SENSITIVITY_PER_CLIP = 2.0
"""L2 sensitivity of a clipped update, in clip norms, when a client's whole dataset is replaced."""

_DRAWS = 4  # sums of several Gaussians hide their floating-point pattern (Holohan and Braghin 2021), as in Opacus


def clip_update(before: State, after: State, clip_norm: float) -> State:
    """``after - before``, scaled down so that its L2 norm over all tensors together is at most ``clip_norm``.

    Args:
        before: the round's global adapter, by tensor name.
        after: the same tensors after local training.
        clip_norm: S.

    Returns:
        fp64 tensors of the same shapes; all zero when anything is not finite, so that a broken training run shows
        no more than a silent one.
    """
    import torch

    deltas = {name: tensor.double().cpu() - before[name].double().cpu() for name, tensor in after.items()}
    norm = math.sqrt(sum(float(delta.square().sum()) for delta in deltas.values()))
    if not math.isfinite(norm):
        return {name: torch.zeros_like(delta) for name, delta in deltas.items()}
    scale = min(1.0, clip_norm / norm) if norm > 0 else 1.0
    return {name: delta * scale for name, delta in deltas.items()}


def perturb_update(
    before: State, after: State, *, noise_multiplier: float, clip_norm: float, noise_seed: int | None = None
) -> State:
    """What may leave the site at client level: ``before`` plus the clipped and noised update.

    Args:
        before: the round's global adapter, by tensor name.
        after: the same tensors after local training without privacy.
        noise_multiplier: sigma, relative to the sensitivity 2 S.
        clip_norm: S.
        noise_seed: tests only; otherwise the noise comes from the system's entropy.

    Raises:
        ValueError: no noise was asked for.

    Guarantees:
        (alpha, alpha / (2 sigma^2))-RDP for replacing the client's whole dataset.
    """
    import torch

    if not 0 < noise_multiplier < math.inf:
        raise ValueError(f"Expected 0 < noise_multiplier={noise_multiplier} < inf.")
    std = noise_multiplier * SENSITIVITY_PER_CLIP * clip_norm
    generator: Any = secret_generator() if noise_seed is None else torch.Generator().manual_seed(noise_seed)
    released: State = {}
    for name, delta in clip_update(before, after, clip_norm).items():
        draws = torch.randn((_DRAWS, *delta.shape), generator=generator, dtype=torch.float64)
        noised = before[name].double().cpu() + delta + draws.sum(dim=0) * (std / math.sqrt(_DRAWS))
        released[name] = noised.to(after[name].dtype)
    return released


def noise_norm(noise_multiplier: float, clip_norm: float, n_parameters: int) -> float:
    """Expected L2 norm of the noise in one client's update."""
    return noise_multiplier * SENSITIVITY_PER_CLIP * clip_norm * math.sqrt(n_parameters)


def hopeless_at_client_level(
    noise_multiplier: float, clip_norm: float, n_parameters: int, n_clients: int
) -> str | None:
    """The arithmetic, when averaging ``n_clients`` leaves more noise than the largest possible update; else None."""
    noise = noise_norm(noise_multiplier, clip_norm, n_parameters)
    ratio = noise / clip_norm / math.sqrt(n_clients)
    if ratio <= 1:
        return None
    enough = math.ceil((noise / clip_norm) ** 2)
    return (
        f"client-level privacy cannot work at this size: the noise in one update has norm about {noise:.3g} "
        f"(2 x noise multiplier {noise_multiplier:.3g} x clip norm {clip_norm:g} x sqrt({n_parameters:,} parameters)) "
        f"while the update itself has at most {clip_norm:g}; averaging {n_clients} clients leaves {ratio:.3g} times "
        f"more noise than signal. It would take about {enough:,} clients, fewer parameters (adapter.rank, "
        "target_modules) or a larger epsilon. privacy.level 'unit' protects every post at a far smaller price."
    )


def with_client_level_warning(plan: DomainPlan, n_parameters: int, n_clients: int) -> DomainPlan:
    """``plan`` with the arithmetic among its warnings, where it is a client-level plan that cannot work."""
    if plan.privacy_level == "unit" or plan.noise_multiplier is None:
        return plan
    told = hopeless_at_client_level(plan.noise_multiplier, plan.clip_norm, n_parameters, n_clients)
    if told is None:
        return plan
    return plan.model_copy(update={"warnings": (*plan.warnings, f"domain {plan.domain!r}: {told}")})
