"""The other objects that belong to a global adapter: named by digest in the adapter object's own header.

An adapter is one immutable object whose sha256 stands for all of it, because its header holds the sha256 of every other
object that belongs to it. Only objects beside it are found that way, so a reader follows no path that it was given.
"""

from pydantic import Field, ValidationError

from fedmentor_core.adapters.lora import metadata_from_bytes
from fedmentor_core.errors import IntegrityError
from fedmentor_core.hashing import canonical_json
from fedmentor_core.records import ArtifactRef, Record

_KEY = "parts"


class Part(Record):
    """An object beside the adapter object."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    n_bytes: int = Field(ge=0)

    @classmethod
    def of(cls, ref: ArtifactRef) -> "Part":
        """The part that an object in the store is."""
        return cls(sha256=ref.sha256, n_bytes=ref.n_bytes)

    def beside(self, adapter: ArtifactRef) -> ArtifactRef:
        """Where it is: in the adapter object's folder, under its own digest."""
        folder, _, _ = adapter.key.rpartition("/")
        return ArtifactRef(key=f"{folder}/{self.sha256}.safetensors", sha256=self.sha256, n_bytes=self.n_bytes)


class AdapterParts(Record):
    """What belongs to an adapter beside the tensors in its own object."""

    held: Part | None = Field(default=None, description="Trained tensors that the last round left as they were.")
    base: Part | None = Field(default=None, description="What was added to the frozen base: the base's version.")
    server: Part | None = Field(default=None, description="Memory of the server's step; clients do not read it.")

    def metadata(self) -> dict[str, str]:
        """For the adapter object's header; empty where nothing belongs to it."""
        named = self.model_dump(exclude_none=True)
        return {_KEY: canonical_json(named).decode()} if named else {}

    @classmethod
    def in_bytes(cls, data: bytes) -> "AdapterParts":
        """Read an adapter object's header.

        Raises:
            IntegrityError: it is no safetensors file, or names its parts in no form that we know.
        """
        said = metadata_from_bytes(data).get(_KEY)
        if said is None:
            return cls()
        try:
            return cls.model_validate_json(said)
        except ValidationError:
            raise IntegrityError("an adapter's header names its parts in an unknown form.") from None
