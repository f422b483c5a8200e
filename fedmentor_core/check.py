"""One check of ``fedmentor doctor``: what was looked at, what was found, why it matters, what to do."""

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Check(BaseModel):
    """A finding. ``warn`` says what to know; only ``fail`` makes the whole fail."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    status: Literal["pass", "warn", "fail"]
    found: str
    why: str
    remedy: str = ""


class Diagnosis(BaseModel):
    """All findings about one thing, and what the checks left there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    subject: str
    checks: tuple[Check, ...]
    left: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """True when nothing failed."""
        return all(check.status != "fail" for check in self.checks)
