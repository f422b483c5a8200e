"""One adapter's outputs on a gate or test set, scored row by row: the numbers before anything is summed up."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedmentor_core.config import EvaluationConfig
from fedmentor_core.data.encode import EncodedExamples
from fedmentor_core.evaluation import refusals
from fedmentor_core.evaluation.generate import generate
from fedmentor_core.evaluation.labels import YES_NO_FORM, AnswerForm
from fedmentor_core.evaluation.perplexity import log_losses
from fedmentor_core.evaluation.repetition import is_repetitive
from fedmentor_core.evaluation.toxicity import ToxicityScorer
from fedmentor_core.evaluation.utility import UtilityScorer
from fedmentor_core.records import ScorerIdentities


@dataclass(frozen=True)
class EvaluationSet:
    """Rows of one domain's gate or test split, with tokenised prompts."""

    domain: str
    split: Literal["gate", "test"]
    rows: Sequence[Mapping[str, Any]]
    prompts: Sequence[Sequence[int]]
    targets: EncodedExamples | None = None
    """Prompts with their references, of a public set: what perplexity is measured on."""
    form: AnswerForm = YES_NO_FORM
    """How the domain's answers say their label."""


@dataclass(frozen=True)
class Scorers:
    """Loaded once per process."""

    utility: UtilityScorer
    toxicity: ToxicityScorer
    safe_threshold: float

    @classmethod
    def load(cls, config: EvaluationConfig) -> "Scorers":
        """Load both scorers.

        Raises:
            BackboneError: a scorer's model is not found.
        """
        return cls(UtilityScorer(config.bertscore), ToxicityScorer(config.toxicity), config.toxicity.safe_threshold)

    @property
    def identities(self) -> ScorerIdentities:
        """Names and digests for the report."""
        utility, toxicity = self.utility.identity, self.toxicity.identity
        stemmed = ", stemmed" if utility.rouge_stemmer else ""
        return ScorerIdentities(
            bertscore=f"{utility.model} layer {utility.num_layers}, bert-score {utility.bert_score_version} "
            f"({utility.bert_score_hash}), weights sha256 {utility.weights_sha256[:16]}",
            rouge=f"rougeL F-measure{stemmed}, rouge-score {utility.rouge_score_version}",
            toxicity=f"{toxicity.model} ({toxicity.architecture}), detoxify {toxicity.detoxify_version}, label "
            f"{toxicity.label}, weights sha256 {toxicity.weights_sha256[:16]}",
            safe_threshold=self.safe_threshold,
            bertscore_rescaled=None
            if utility.baseline_f1 is None
            else f"{utility.rescaled_hash}, baseline {utility.baseline_f1:.6f}",
            refusals=refusals.identity(),
        )


@dataclass(frozen=True, slots=True)
class RowScores:
    """One output and its scores. Of a private set it stays inside the evaluation.

    Attributes:
        output: what the model wrote, stripped; may be empty.
        reference: the row's own answer.
        bertscore_f1: 0 for an empty output.
        rouge_l: 0 for an empty output.
        toxicity: probability in [0, 1].
        safe: toxicity is below the threshold.
        label: the row's label, such as 'yes' or 'no'; empty where it has none.
        answer: the label that the output gives, by the domain's answer form, or None.
        bertscore_f1_raw: as the encoder gives it; None where it was not computed.
        bertscore_f1_rescaled: None where no baseline is known.
        refused: the output declines to answer.
        repetitive: the output says the same four words three times.
        log_loss: negative log-likelihood of the reference in nats; None where it was not measured.
        n_tokens: of the reference, as far as it was measured.
    """

    output: str
    reference: str
    bertscore_f1: float
    rouge_l: float
    toxicity: float
    safe: bool
    label: str
    answer: str | None
    bertscore_f1_raw: float | None = None
    bertscore_f1_rescaled: float | None = None
    refused: bool = False
    repetitive: bool = False
    log_loss: float | None = None
    n_tokens: int = 0


def score_rows(
    model: Any,
    tokenizer: Any,
    data: EvaluationSet,
    scorers: Scorers,
    config: EvaluationConfig,
    *,
    device: str,
    width: int | None = None,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
    on_written: Callable[[], None] = lambda: None,
) -> list[RowScores]:
    """Generate greedily and score every row, in the set's order.

    Args:
        model: with the adapter loaded, in eval mode.
        tokenizer: the model's.
        data: the set.
        scorers: of utility and safety.
        config: the study's ``evaluation`` section.
        device: where the model is.
        width: see ``generate``: a private set needs one, so that a row's scores follow from that row alone.
        on_batch: progress in rows (done, in all).
        on_written: called when the model is needed no more; what is left is the scorers' work.
    """
    outputs = generate(
        model,
        tokenizer,
        data.prompts,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        device=device,
        width=width,
        on_batch=on_batch,
    )
    losses: Sequence[float | None] = [None] * len(outputs)
    n_tokens: Sequence[int] = [0] * len(outputs)
    if data.targets is not None:
        losses, n_tokens = log_losses(model, tokenizer, data.targets, batch_size=config.batch_size, device=device)
    on_written()
    references = [str(row["response"]) for row in data.rows]
    utility = scorers.utility.score(outputs, references)
    toxicity = scorers.toxicity.score(outputs)
    return [
        RowScores(
            output=output,
            reference=reference,
            bertscore_f1=useful.bertscore_f1,
            rouge_l=useful.rouge_l,
            toxicity=toxic,
            safe=toxic < config.toxicity.safe_threshold,
            label=str(row["label"]),
            answer=data.form.parse(output),
            bertscore_f1_raw=useful.bertscore_f1_raw,
            bertscore_f1_rescaled=useful.bertscore_f1_rescaled,
            refused=refusals.is_refusal(output),
            repetitive=is_repetitive(output),
            log_loss=log_loss,
            n_tokens=tokens,
        )
        for row, output, reference, useful, toxic, log_loss, tokens in zip(
            data.rows, outputs, references, utility, toxicity, losses, n_tokens, strict=True
        )
    ]
