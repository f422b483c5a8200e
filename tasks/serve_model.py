"""Models-from-code: MLflow copies this file into a registered model and runs it when the model is loaded.

The model folder holds the adapter and ``backbone.json``. The backbone is loaded by that reference and must
have the sha256 written there. FedMentor itself must be installed where the model is loaded.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import mlflow
from mlflow.pyfunc import PythonModel, PythonModelContext

COLUMNS = ("post", "question", "prompt")


class FedMentorModel(PythonModel):
    """Answers questions about posts with a frozen backbone and its registered adapter."""

    _skip_type_hint_validation = True  # MLflow would warn at every load; the signature is given

    def load_context(self, context: PythonModelContext) -> None:
        """Load the backbone, verify its digest, attach the adapter.

        ``model_config`` may move it: ``backbone`` (folder or hub id, the same weights) and ``device``.

        Raises:
            BackboneError: the backbone is not found, or is not the one the adapter was trained on.
        """
        import json

        from fedmentor_core.adapters.backbone import load_backbone
        from fedmentor_core.adapters.lora import load_adapter_folder
        from fedmentor_core.config import BackboneConfig

        reference = json.loads(Path(context.artifacts["backbone"]).read_text(encoding="utf-8"))
        settings = context.model_config or {}
        self.max_length = int(reference["max_length"])
        self.max_new_tokens = int(reference["max_new_tokens"])
        self.backbone = load_backbone(
            BackboneConfig(
                name=settings.get("backbone") or reference["name"],
                revision=reference["revision"],
                sha256=reference["sha256"],
                dtype=reference["dtype"],
                device=settings.get("device") or "auto",
                max_length=self.max_length,
            )
        )
        self.model = load_adapter_folder(self.backbone, Path(context.artifacts["adapter"]))

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """Generate one answer per row.

        Args:
            context: unused.
            model_input: a DataFrame or list of mappings with ``post`` and ``question``, or a raw ``prompt``.
            params: ``max_new_tokens``.

        Returns:
            Answers in the rows' order; may be empty strings.
        """
        from fedmentor_core.errors import ConfigError
        from fedmentor_core.evaluation.generate import generate

        max_new_tokens = int((params or {}).get("max_new_tokens", self.max_new_tokens))
        if not 0 < max_new_tokens < self.max_length:
            raise ConfigError(
                f"max_new_tokens must be from 1 to {self.max_length - 1} (the context less one), got {max_new_tokens}."
            )
        rows = list(enumerate(_rows(model_input), start=1))
        return generate(
            self.model,
            self.backbone.tokenizer,
            [self._encode(row, number, max_new_tokens) for number, row in rows],
            max_new_tokens=max_new_tokens,
            device=self.backbone.device,
        )

    def _encode(self, row: Mapping[str, str], number: int, max_new_tokens: int) -> list[int]:
        """Token ids of one row's prompt; a long post is cut at its end, a question or raw prompt never."""
        from fedmentor_core.data.encode import encode_prompts
        from fedmentor_core.errors import ConfigError

        if "prompt" in row:
            ids = list(self.backbone.tokenizer(row["prompt"])["input_ids"])
            room = self.max_length - max_new_tokens
            if not 0 < len(ids) <= room:
                raise ConfigError(f"row {number}: the prompt has {len(ids)} tokens; allowed: 1 to {room}.")
            return ids
        missing = [name for name in ("post", "question") if name not in row]
        if missing:
            raise ConfigError(f"row {number}: needs 'post' and 'question', or 'prompt'; missing: {', '.join(missing)}.")
        return encode_prompts(self.backbone.tokenizer, [row], self.max_length, max_new_tokens).input_ids[0]


def _rows(model_input: Any) -> list[dict[str, str]]:
    """The rows' texts; a missing or empty (None, NaN) cell is left out."""
    if hasattr(model_input, "to_dict"):
        model_input = model_input.to_dict(orient="records")
    if isinstance(model_input, Mapping) or not isinstance(model_input, Iterable):
        model_input = [model_input]
    return [{name: row[name] for name in COLUMNS if isinstance(row.get(name), str)} for row in model_input]


mlflow.models.set_model(FedMentorModel())
