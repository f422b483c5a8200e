"""Two attacks: scores that should be higher for a canary that was trained on.

**Loss.** The attack of whoever sees what leaves the site (the server) or the model alone: how much training lowered the
canary's loss.

**Gradient.** The attack of whoever sees every noised gradient. Nobody does, but the theorem protects against him too,
because the optimizer's steps are functions of them; so what he finds must stay below epsilon all the same, and he finds
far more. In each round, with X the canaries' clipped gradients at the adapter the round began with (in units of C), and
y the sum of the round's noised gradients (in units of C), a ridge regression

    score = (X X^T + RIDGE I)^{-1} X y

estimates how often each canary was in a batch, its likeness to the other canaries taken out. The domain's own posts are
not in X: a score that used them would be a release of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedmentor_core.adapters.lora import cut_to_rank, load_state, trainable_parameters
from fedmentor_core.audit.canaries import AuditWorkspace
from fedmentor_core.audit.meter import SeenStep
from fedmentor_core.audit.probes import padded
from fedmentor_core.records import ArtifactRef, ClientAssignment, ClientUpdate, DomainPlan
from fedmentor_core.training.client import TrainingSet
from fedmentor_core.wire.update import Base

Attack = Literal["loss", "gradient"]
_SCORE_BATCH = 32
RIDGE = 0.1
"""Small on purpose: right where noise is missing, which is what an audit looks for."""
_MOST_COORDINATES = 65_536


@dataclass(frozen=True, slots=True)
class ClientTrace:
    """One client in one round, as it was seen from outside; ``gradient`` is the sum over its steps, flat."""

    assignment: ClientAssignment
    update: ClientUpdate
    steps: tuple[SeenStep, ...]
    gradient: Any


def loss_scores(
    workspace: AuditWorkspace, done: Sequence[ClientTrace], final: ArtifactRef, domain: str
) -> tuple[list[float], list[float]]:
    """How much training lowered each canary's loss: by the site's released updates, and by the final adapter.

    The first: in each round, loss under the global adapter that the client started from minus loss under its update,
    summed over rounds. The second: loss under the untrained backbone minus loss under the final adapter.
    """
    data, rank = workspace.canary_set(domain), workspace.config.adapter_of(domain).rank
    model = workspace.model_with(workspace.initial_adapter.trained, domain=domain)
    known: dict[str, list[float]] = {}

    def losses_under(adapter: ArtifactRef, update: ArtifactRef | None = None) -> list[float]:
        """Under a global adapter, or under a client's update of it, which holds only what the round trained."""
        scored = adapter if update is None else update
        if scored.sha256 not in known:
            start = cut_to_rank(workspace.get_adapter(adapter), rank)
            trained = {} if update is None else workspace.get_update(update, Base(adapter.sha256, start))
            load_state(model, {**start, **trained})
            known[scored.sha256] = losses(model, data, workspace.backbone.device)
        return known[scored.sha256]

    scores = [0.0] * data.n_units
    for one in done:
        assert one.update.update is not None
        start = one.assignment.global_adapter
        before, after = losses_under(start), losses_under(start, one.update.update)
        scores = [score + b - a for score, b, a in zip(scores, before, after, strict=True)]
    base, tuned = losses_under(workspace.initial_adapter.trained), losses_under(final)
    return scores, [b - a for b, a in zip(base, tuned, strict=True)]


def losses(model: Any, data: TrainingSet, device: str) -> list[float]:
    """Each row's mean loss over its targets, in batches of similar length."""
    import torch

    from fedmentor_core.training.forward import losses_of

    model.eval()
    order = sorted(range(len(data.input_ids)), key=lambda row: len(data.input_ids[row]))
    found = [0.0] * len(order)
    with torch.no_grad():
        for start in range(0, len(order), _SCORE_BATCH):
            rows = order[start : start + _SCORE_BATCH]
            for row, loss in zip(rows, losses_of(model, *padded(data, rows, device)).tolist(), strict=True):
                found[row] = loss
    return found


def gradient_scores(workspace: AuditWorkspace, done: Sequence[ClientTrace], plan: DomainPlan) -> list[float]:
    """How much of each canary's gradient is in the noised gradients, summed over rounds."""
    import torch

    data = workspace.canary_set(plan.domain)
    expected = plan.sample_rate * workspace.training_set(plan.domain).n_units
    scores = torch.zeros(data.n_units, dtype=torch.float64)
    for one in done:
        if one.gradient is None:
            continue
        assignment = one.assignment
        model = workspace.model_with(assignment.global_adapter, assignment.round_index, assignment.domain)
        every = max(1, one.gradient.numel() // _MOST_COORDINATES)
        noised = one.gradient[::every].double().cpu() * expected / plan.clip_norm
        rows = _clipped_gradients(workspace, model, data, plan.clip_norm, every)
        gram = rows @ rows.T + RIDGE * torch.eye(len(rows), dtype=torch.float64)
        scores += torch.linalg.solve(gram, rows @ noised)
    return [float(score) for score in scores]


def _clipped_gradients(workspace: AuditWorkspace, model: Any, data: TrainingSet, clip: float, every: int) -> Any:
    """(canaries, coordinates) gradients clipped and in units of the clip norm; every ``every``-th coordinate."""
    import torch

    from fedmentor_core.training.forward import losses_of

    parameters = list(trainable_parameters(model).values())
    weight = getattr(workspace.config.training, "first_token_weight", None)
    options = {} if weight is None else {"first_token_weight": weight}
    rows = []
    for row in range(data.n_units):
        loss = losses_of(model, *padded(data, [row], workspace.backbone.device), **options).sum()
        flat = torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)])
        factor = min(1.0, clip / max(float(flat.norm()), 1e-30)) / clip
        rows.append(flat[::every].double().cpu() * factor)
    return torch.stack(rows)
