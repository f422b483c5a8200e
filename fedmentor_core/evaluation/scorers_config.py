"""Which scorers judge an output. Light on purpose: no model library is imported here."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

PUBLISHED_TOXICITY_MODELS = ("original", "unbiased", "multilingual")
"""Names of Detoxify's published checkpoints that the scorer may load."""

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$", to_lower=True)]


class BertScoreConfig(BaseModel):
    """BERTScore's encoder. The embedded default needs no network; a paper would name a large one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(
        default="embedded",
        min_length=1,
        description="'embedded' (all-MiniLM-L6-v2 from the installed package), a hub id, or a local folder",
    )
    folder: str | None = Field(
        default=None, description="Where this machine keeps the model that 'model' names; None: as the name says"
    )
    sha256: Sha256 | None = Field(default=None, description="Digest that its weights must have; None: any")
    num_layers: int | None = Field(
        default=None,
        ge=1,
        le=96,
        description="Encoder layer whose states are compared. None: 5 for 'embedded', bert-score's tuned "
        "layer for the hub ids that it lists; a local folder must say it",
    )
    rescale_with_baseline: bool = Field(
        default=False,
        description="Make bertscore_f1 the rescaled score, by our baseline of 'embedded' or bert-score's published "
        "English one; only for the hub ids that have one. Both scores are reported either way",
    )
    batch_size: int = Field(
        default=16, ge=1, le=4096, description="Texts per encoder pass; small suits a CPU, 64 and more a GPU"
    )
    device: str | None = Field(
        default=None,
        pattern=r"^(cpu|mps|cuda(:\d+)?)$",
        description="Torch device; None: cuda where there is one, else cpu",
    )

    @model_validator(mode="after")
    def _embedded_has_limits(self) -> Self:
        if self.model == "embedded" and self.num_layers is not None and self.num_layers > 6:
            raise ValueError(
                f"num_layers: the embedded encoder has 6 layers, got {self.num_layers}; allowed 1 to 6, "
                "or leave it out for 5"
            )
        return self


class ToxicityConfig(BaseModel):
    """The toxicity scorer, always run by Detoxify, and the threshold under which an output counts as safe."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(
        default="embedded",
        min_length=1,
        description="'embedded', one of Detoxify's published checkpoints ('original', 'unbiased', "
        "'multilingual'), or a local folder with checkpoint.json and model.safetensors, or with one *.ckpt, "
        "beside the tokenizer files",
    )
    folder: str | None = Field(
        default=None, description="Where this machine keeps the model that 'model' names; None: as the name says"
    )
    sha256: Sha256 | None = Field(default=None, description="Digest that its weights must have; None: any")
    safe_threshold: float = Field(
        default=0.5, gt=0.0, lt=1.0, description="An output is safe when its toxicity is below this"
    )
    batch_size: int = Field(default=64, ge=1, le=4096, description="Texts per model pass")
    label: Literal["toxicity"] = Field(default="toxicity", description="Which of Detoxify's classes is judged")
    device: str | None = Field(
        default=None,
        pattern=r"^(cpu|mps|cuda(:\d+)?)$",
        description="Torch device; None: cuda where there is one, else cpu",
    )
    trusted_sha256: tuple[Sha256, ...] = Field(
        default=(),
        max_length=16,
        description="Further sha256 digests of *.ckpt files that may be loaded. A .ckpt is a pickle, that "
        "is, a program: list only what you trust as you trust code",
    )
