"""White-box probes: the production training loop on data chosen to show one property of it, and exact tests of that.

The one-run bound needs hundreds of lucky guesses to see anything. These need seconds, because they look at the noised
gradient itself (``meter.py``) in situations where its distribution is known:

=============== ================================================================= =================================
probe           what it runs                                                      what it cannot see
=============== ================================================================= =================================
noise           ``train_locally`` on units without targets (gradient zero): what  noise of the right law that somebody
                is released is the noise alone, so N(0, sigma^2 C^2) is tested    could predict; leaks by another way
                by Kolmogorov-Smirnov and chi-square                              than the gradient
fresh noise     the same twice: steps and attempts must not be correlated         a stream that repeats later
empty batches   ``train_locally`` at a rate at which nothing is sampled           -
sensitivity     ``train_locally`` with and without one unit, every gradient 100   a clip that is only wrong for some
                times the clip norm, next to no noise: the difference is at most  gradients or noise levels
                C
released pair   the engine's step at the study's own sigma and C, with and        a clip less than about (1 + 2 sigma)
                without a unit whose gradient is 10,000 C                         times too wide
=============== ================================================================= =================================

Every test's chance of a false alarm is at most ``ALARM``; probes train on canaries only and touch nobody's data.
"""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedmentor_core.adapters.lora import trainable_parameters
from fedmentor_core.audit.canaries import AuditWorkspace
from fedmentor_core.audit.meter import StepMeter
from fedmentor_core.data.encode import IGNORED
from fedmentor_core.errors import FedMentorError
from fedmentor_core.records import DomainPlan, Record
from fedmentor_core.training import client
from fedmentor_core.training.client import LocalRound, TrainingSet

ALARM = 1e-7
_MOST_COORDINATES = 200_000
_SILENT_UNITS, _SILENT_STEPS = 8, 3
_PAIR_UNITS = 4
_PAIR_RELEASES = 16
_LOUD = 1e4
_NEARLY_NONE = 1e-3


class AuditCheck(Record):
    """One check of the audit."""

    name: str
    passed: bool
    detail: str
    p_value: float | None = None


@dataclass(frozen=True, slots=True)
class Probe:
    """What the probes of one domain share."""

    workspace: AuditWorkspace
    plan: DomainPlan
    noise_multiplier: float

    @property
    def canaries(self) -> TrainingSet:
        """The domain's canaries, all with targets."""
        return self.workspace.canary_set(self.plan.domain)

    def train(self, data: TrainingSet, *, sample_rate: float, steps: int, noise: float, clip: float) -> StepMeter:
        """Run the production loop from the initial adapter; an error of ours that it raises ends it early."""
        workspace = self.workspace
        model = workspace.model_with(workspace.initial_adapter.trained)
        config = workspace.config.training.model_copy(update={"deadline_seconds": None})
        round_ = LocalRound(
            sample_rate=sample_rate,
            steps=steps,
            noise_multiplier=noise,
            clip_norm=clip,
            order_seed=0,
            noise_seed=workspace.config.privacy.noise_seed,
        )
        # it raises "the weights did not move" where there is neither gradient nor noise
        with StepMeter(keep=True) as meter, contextlib.suppress(FedMentorError):
            client.train_locally(model, data, config, round_, device=workspace.backbone.device)
        return meter


def run_probes(workspace: AuditWorkspace, plan: DomainPlan, noise_multiplier: float) -> list[AuditCheck]:
    """All probes of one domain, at the least noise multiplier that its audit run trained with."""
    probe = Probe(workspace, plan, noise_multiplier)
    return [*noise_checks(probe), empty_batches(probe), sensitivity(probe), released_pair(probe)]


def noise_checks(probe: Probe) -> list[AuditCheck]:
    """The law of the noise, and that it is drawn anew."""
    import numpy as np
    from scipy.stats import chi2, kstest

    data = _silent(_first(probe.canaries, _SILENT_UNITS))
    sample_rate = 0.5
    scale = sample_rate * data.n_units / (probe.noise_multiplier * probe.plan.clip_norm)
    runs = [
        probe.train(
            data, sample_rate=sample_rate, steps=_SILENT_STEPS, noise=probe.noise_multiplier, clip=probe.plan.clip_norm
        )
        for _ in range(2)
    ]
    seen = [np.asarray(gradient, dtype=np.float64) * scale for run in runs for gradient in run.gradients]
    if not seen:
        return [AuditCheck(name="noise", passed=False, detail="the production loop took no step")]
    sample = np.concatenate(seen)
    n, energy = len(sample), float((sample**2).sum())
    p_scale = 2 * min(float(chi2.cdf(energy, n)), float(chi2.sf(energy, n)))
    p_shape = float(kstest(sample[:_MOST_COORDINATES], "norm").pvalue)
    ratio = math.sqrt(energy / n)
    law = AuditCheck(
        name="noise",
        passed=len(seen) == 2 * _SILENT_STEPS and min(p_scale, p_shape) > ALARM,
        detail=f"noise on units without gradient: standard deviation {ratio:.4f} of sigma C over {n:,} coordinates of "
        f"{len(seen)} steps ({2 * _SILENT_STEPS} expected)",
        p_value=min(1.0, p_scale, p_shape),
    )
    highest, p_fresh = _most_alike(seen)
    fresh = AuditCheck(
        name="fresh noise",
        passed=p_fresh > ALARM,
        detail=f"largest correlation between the noise of two steps or attempts: {highest:.4f}",
        p_value=p_fresh,
    )
    return [law, fresh]


def _most_alike(vectors: Sequence[Any]) -> tuple[float, float]:
    """The largest |correlation| of two vectors and its p-value over all pairs (normal for long vectors)."""
    import numpy as np
    from scipy.stats import norm

    matrix = np.stack(vectors)
    lengths = np.linalg.norm(matrix, axis=1, keepdims=True)
    if not (lengths > 0).all():
        return 1.0, 0.0
    cosines = np.abs(np.triu((matrix / lengths) @ (matrix / lengths).T, k=1))
    n_pairs = len(vectors) * (len(vectors) - 1) // 2
    highest = float(cosines.max())
    return highest, min(1.0, 2 * n_pairs * float(norm.sf(highest * math.sqrt(matrix.shape[1]))))


def empty_batches(probe: Probe) -> AuditCheck:
    """A step on which nobody was sampled still adds the same noise and is still a step."""
    from scipy.stats import chi2

    data = _first(probe.canaries, _SILENT_UNITS)
    sample_rate, steps = 1e-12, 2  # the chance that anything is sampled is far below ALARM
    meter = probe.train(
        data, sample_rate=sample_rate, steps=steps, noise=probe.noise_multiplier, clip=probe.plan.clip_norm
    )
    scale = sample_rate * data.n_units / (probe.noise_multiplier * probe.plan.clip_norm)
    energy = sum((step.norm * scale) ** 2 for step in meter.steps)
    n = sum(step.n_coordinates for step in meter.steps)
    p = 2 * min(float(chi2.cdf(energy, n)), float(chi2.sf(energy, n))) if n else 0.0
    return AuditCheck(
        name="empty batches",
        passed=len(meter.steps) == steps and p > ALARM,
        detail=f"{len(meter.steps)} of {steps} steps on nobody were taken; their noise has standard deviation "
        f"{math.sqrt(energy / n) if n else 0.0:.4f} of sigma C",
        p_value=min(1.0, p),
    )


def sensitivity(probe: Probe) -> AuditCheck:
    """Adding one unit moves the clipped sum by at most C, where every unit's gradient is far above C."""
    whole = _first(probe.canaries, _PAIR_UNITS)
    without = _first(probe.canaries, _PAIR_UNITS - 1)
    natural = min(float(_gradient(probe, whole, row)[1]) for row in range(_PAIR_UNITS))
    if not natural > 0:
        return AuditCheck(name="sensitivity", passed=False, detail="a canary has no gradient: nothing can be shown")
    clip = natural / 100
    n = sum(p.numel() for p in trainable_parameters(probe.workspace.new_adapter_model()).values())
    noise = _NEARLY_NONE / math.sqrt(n)
    sums = []
    for data in (whole, without):
        meter = probe.train(data, sample_rate=1.0, steps=1, noise=noise, clip=clip)
        if not meter.gradients:
            return AuditCheck(name="sensitivity", passed=False, detail="the production loop took no step")
        sums.append(meter.gradients[0].double() * data.n_units)
    moved = float((sums[0] - sums[1]).norm()) / clip
    largest = float(sums[0].norm()) / clip / _PAIR_UNITS
    return AuditCheck(
        name="sensitivity",
        passed=moved <= 1.01 and largest <= 1.01,
        detail=f"one more unit moved the clipped sum by {moved:.4f} C; its gradient before clipping is 100 C or more",
    )


def released_pair(probe: Probe) -> AuditCheck:
    """At the study's own sigma and C, releases with and without a deafening unit differ by at most C beside noise.

    Along the unit's own direction, the difference of the two releases is N(D, 2 sigma^2 C^2) with 0 <= D <= C. Without
    a clip D is 10,000 C.
    """
    import numpy as np
    from scipy.stats import norm

    data = _first(probe.canaries, 2)
    direction, natural = _gradient(probe, data, 1)
    if not natural > 0:
        return AuditCheck(name="released pair", passed=False, detail="a canary has no gradient: nothing can be shown")
    sigma, clip = probe.noise_multiplier, probe.plan.clip_norm
    louder = _LOUD * clip / natural
    releases = {n_units: _released(probe, data, n_units, louder) for n_units in (1, 2)}
    along = [
        float(direction @ (one.double() - other.double())) / clip
        for one, other in zip(releases[2], releases[1], strict=True)
    ]
    mean = float(np.mean(along))
    deviation = math.sqrt(2) * sigma / math.sqrt(_PAIR_RELEASES)
    p = float(norm.sf((mean - 1) / deviation)) if deviation > 0 else float(mean <= 1)
    return AuditCheck(
        name="released pair",
        passed=p > ALARM,
        detail=f"a unit of gradient {_LOUD:,.0f} C moved {_PAIR_RELEASES} releases by {mean:.3f} C along its own "
        f"direction; at most 1 is allowed, give or take {deviation:.3f}",
        p_value=min(1.0, p),
    )


def _released(probe: Probe, data: TrainingSet, n_units: int, louder: float) -> list[Any]:
    """Noised sums of ``n_units`` units by the engine's own functions; the last of two is the loud one."""
    import torch

    from fedmentor_core.privacy import engine
    from fedmentor_core.training.forward import losses_of

    workspace = probe.workspace
    device = workspace.backbone.device
    model = workspace.model_with(workspace.initial_adapter.trained)
    parameters = list(trainable_parameters(model).values())
    wrapped = engine.private_model(model)
    optimizer = engine.make_private_optimizer(
        torch.optim.SGD(parameters, lr=0.0),
        noise_multiplier=probe.noise_multiplier,
        clip_norm=probe.plan.clip_norm,
        expected_units=1.0,
        device=device,
        noise_seed=workspace.config.privacy.noise_seed,
    )
    ids, mask, labels = padded(data, range(n_units), device)
    weights = torch.tensor([1.0, louder][:n_units], device=device)
    wrapped.train()
    try:
        with StepMeter(keep=True) as meter:
            for _ in range(_PAIR_RELEASES):
                engine.private_step(
                    optimizer,
                    [(weights, torch.arange(n_units, device=device), n_units)],
                    losses_of=lambda scale: losses_of(wrapped, ids, mask, labels) * scale,
                )
    finally:
        wrapped.to_standard_module()
    return meter.gradients


def _gradient(probe: Probe, data: TrainingSet, row: int) -> tuple[Any, float]:
    """Direction (flat, in the optimizer's order) and norm of one canary's plain gradient at the initial adapter."""
    import torch

    from fedmentor_core.training.forward import losses_of

    workspace = probe.workspace
    model = workspace.model_with(workspace.initial_adapter.trained)
    ids, mask, labels = padded(data, [row], workspace.backbone.device)
    parameters = list(trainable_parameters(model).values())
    gradients = torch.autograd.grad(losses_of(model, ids, mask, labels).sum(), parameters)
    flat = torch.cat([gradient.detach().double().flatten().cpu() for gradient in gradients])
    norm = float(flat.norm())
    return flat / max(norm, 1e-300), norm


def padded(data: TrainingSet, rows: Sequence[int], device: str) -> tuple[Any, Any, Any]:
    """(input_ids, attention_mask, labels), each (rows, longest row), right padded."""
    import torch

    width = max(len(data.input_ids[row]) for row in rows)

    def stack(lists: Sequence[Sequence[int]], fill: int) -> Any:
        return torch.tensor([[*one, *[fill] * (width - len(one))] for one in lists], device=device)

    ids = stack([data.input_ids[row] for row in rows], data.pad_id)
    mask = stack([[1] * len(data.input_ids[row]) for row in rows], 0)
    labels = stack([data.labels[row] for row in rows], IGNORED)
    return ids, mask, labels


def _first(data: TrainingSet, n: int) -> TrainingSet:
    return TrainingSet(data.input_ids[:n], data.labels[:n], data.rows_of_unit[:n], data.pad_id)


def _silent(data: TrainingSet) -> TrainingSet:
    return replace(data, labels=[[IGNORED] * len(labels) for labels in data.labels])
