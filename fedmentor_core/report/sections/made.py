"""How the study was made: what exactly was run, and every setting."""

import yaml

from fedmentor_core.config import StudyConfig
from fedmentor_core.records import StudySummary
from fedmentor_core.report import words

_TRAINED = {
    "b": "B only, A frozen and shared (FFA-LoRA)",
    "both": "A and B",
    "alternate": "B in even rounds and A in odd ones (RoLoRA)",
    "core": "a small core between frozen A and B (Fed-SB)",
}


def settings_yaml(config: StudyConfig) -> str:
    """Every setting as YAML that ``fedmentor run --config`` reads; passwords in URLs are blanked."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)
    return words.hide_credentials(text)


def identities(summary: StudySummary) -> list[tuple[str, str]]:
    """What exactly was run and what scored it."""
    backbone, adapter = summary.backbone, summary.adapter
    trained = _TRAINED[adapter.train]
    pairs = [
        ("Backbone", f"{backbone.name}, {backbone.n_parameters:,} parameters"),
        ("Backbone revision", backbone.revision or ""),
        ("Backbone sha256", backbone.sha256),
        (
            "Adapter",
            f"LoRA, rank {adapter.rank}, alpha {adapter.alpha:g}, on {', '.join(adapter.target_modules)}; "
            f"trains {trained}: {adapter.n_trainable:,} parameters, {words.show_bytes(adapter.n_bytes)}",
        ),
        ("BERTScore by", summary.scorers.bertscore),
        ("Rescaled BERTScore by", summary.scorers.bertscore_rescaled or ""),
        ("ROUGE-L by", summary.scorers.rouge),
        ("Toxicity by", summary.scorers.toxicity),
        ("Refusals by", summary.scorers.refusals or ""),
        ("An output is safe when", f"its toxicity is below {summary.scorers.safe_threshold:g}"),
        ("Settings sha256", summary.config_sha256),
        ("Run", summary.run_id),
        ("Store", words.hide_credentials(summary.store_url)),
        ("MLflow", words.hide_credentials(summary.tracking_uri or "")),
        ("MLflow run", summary.mlflow_run_id or ""),
    ]
    return [(name, value) for name, value in pairs if value]
