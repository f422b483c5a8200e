"""An adapter's metrics on the gate or test set and on the safety prompts, stored and found again by content."""

from collections.abc import Callable

from fedmentor_core.evaluation import safety as safety_scoring
from fedmentor_core.evaluation.evaluate import evaluate_domain
from fedmentor_core.evaluation.safety_prompts import read_prompt_sets
from fedmentor_core.evaluation.turn import turn
from fedmentor_core.privacy.validation_plan import SetName
from fedmentor_core.private_gate import evaluate_privately
from fedmentor_core.records import ArtifactRef, DomainEvaluation, SafetyEvaluation
from fedmentor_core.workspace import Workspace


def evaluate(
    workspace: Workspace,
    adapter: ArtifactRef,
    domain: str,
    split: str,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> DomainEvaluation:
    """Evaluate an adapter on one domain's gate or test set. The result is stored and reused by content.

    Metrics of a private set are noised and charged; see ``private_gate.py`` for what that may raise.
    """
    key = workspace.key(f"evaluations/{adapter.sha256[:24]}/{split}-{domain}.json")
    name: SetName = "gate" if split == "gate" else "test"
    if workspace.config.evaluation.gate_data == "private":
        return evaluate_privately(workspace, adapter, domain, name, key, on_batch)
    if workspace.store.exists(key):
        return DomainEvaluation.model_validate(workspace.store.get_json(key))
    data = workspace.evaluation_set(domain, name)
    scorers = workspace.scorers
    with turn(workspace.evaluation_lock) as on_written:
        result = evaluate_domain(
            workspace.evaluation_model_with(adapter),
            workspace.backbone.tokenizer,
            data,
            scorers,
            workspace.config.evaluation,
            device=workspace.backbone.device,
            keep_samples=split == "gate",
            on_batch=on_batch,
            on_written=on_written,
        )
    workspace.store.put_json(key, result)
    return result


def evaluate_safety(workspace: Workspace, adapter: ArtifactRef) -> SafetyEvaluation | None:
    """An adapter's answers to the safety prompts, scored; stored and reused by content. None: none are configured.

    Raises:
        ConfigError, DataError: the prompts cannot be read or do not fit.
    """
    config = workspace.config.evaluation.safety_prompts
    if config is None:
        return None
    key = workspace.key(f"evaluations/{adapter.sha256[:24]}/safety.json")
    if workspace.store.exists(key):
        return SafetyEvaluation.model_validate(workspace.store.get_json(key))
    sets = read_prompt_sets(config, workspace.config.data.root)
    scorers = workspace.scorers
    with turn(workspace.evaluation_lock) as on_written:
        result = safety_scoring.evaluate_safety(
            workspace.evaluation_model_with(adapter),
            workspace.backbone.tokenizer,
            sets,
            scorers,
            config,
            device=workspace.backbone.device,
            max_length=workspace.config.backbone.max_length,
            batch_size=workspace.config.evaluation.batch_size,
            on_written=on_written,
        )
    workspace.store.put_json(key, result)
    return result
