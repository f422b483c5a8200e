"""A workspace at a site: one domain of one run, with the site's own data, policy and ledger.

It writes below ``sites/<site>/<domain>/runs/<run>`` of its own store, or of the study's where it has none, and nowhere
else; of the study's it reads the adapters that a request names. So the least that a site's credentials must allow is
known (``docs/sites.md``).
"""

import logging
from functools import cached_property
from pathlib import Path
from typing import Any

from fedmentor_core.adapters.lora import attach, load_state
from fedmentor_core.champion import Champion
from fedmentor_core.config_io import config_sha256
from fedmentor_core.errors import AlreadyExistsError, ConfigError
from fedmentor_core.privacy.refusals import refused
from fedmentor_core.records import ArtifactRef, DomainPlan, StudyPlan
from fedmentor_core.site.file import RequestRefusedError, SiteFile, at_site
from fedmentor_core.site.requests import EvaluateRequest, PlanRequest, TrainRequest, folder_of
from fedmentor_core.site.signing import read_key_file, told_entry
from fedmentor_core.storage.base import ArtifactStore, open_store
from fedmentor_core.study_ref import StudyRef
from fedmentor_core.workspace import SITES_FOLDER, Workspace

_log = logging.getLogger("fedmentor.site")


class SiteWorkspace(Workspace):
    """What one request is carried out with."""

    def __init__(self, request: PlanRequest | TrainRequest | EvaluateRequest, file: SiteFile) -> None:
        """Complete the request's study from the site's file; nothing is loaded yet.

        Raises:
            RequestRefusedError: the site does not hold the domain, or private posts are taken for public ones.
        """
        super().__init__(StudyRef(config=at_site(request.config, file), run_id=request.run_id, out_dir=""))
        self.request = request
        self.site = file.site
        self._study_storage = file.store
        self._key_file = Path(file.signing_key_file)
        self.domain = request.domain

    def key(self, path: str) -> str:
        """Store key of something that this site writes for this run."""
        return f"{folder_of(self.site, self.domain, self.ref.run_id)}/{path}"

    @cached_property
    def _study_store(self) -> ArtifactStore:
        return open_store(str(self._study_storage.url), self._study_storage)

    def store_holding(self, key: str) -> ArtifactStore:
        """What the site wrote is in its own store, the server's adapters are in the study's."""
        return self.store if key.startswith(f"{SITES_FOLDER}/") else self._study_store

    def claim(self) -> None:
        """Hold a run to the configuration that it came with first.

        Raises:
            RequestRefusedError: the same run came with another configuration before.
        """
        try:
            self.store.put_json(self.key("study.json"), {"config_sha256": config_sha256(self.request.config)})
        except AlreadyExistsError:
            raise RequestRefusedError(
                f"run {self.ref.run_id!r} came to site {self.site!r} with another configuration before. Start a new "
                "run."
            ) from None

    def newest_entry(self, domain: str) -> str:
        """As the server is told of it: nothing of the entry can be found out from it."""
        sha256 = super().newest_entry(domain)
        return told_entry(read_key_file(self._key_file), sha256) if sha256 else ""

    @property
    def domain_plan(self) -> DomainPlan:
        """The domain's plan, refused or not; one that is not refused is kept for the rest of the run."""
        if self.is_planned:
            return self.plan.domains[0]
        made = self.make_plan()
        if not made.refusals:
            self.settle_plan(made)
        return made.domains[0]

    @property
    def n_clients(self) -> int:
        """Clients of the whole study, as the server says."""
        return self.request.n_clients if isinstance(self.request, PlanRequest) else 1

    @property
    def frozen_adapter(self) -> ArtifactRef:
        """The server's: it is made once for all clients, because other hardware may draw other numbers."""
        if isinstance(self.request, PlanRequest):
            raise ConfigError("a request for a plan names no adapter.")
        return self.request.frozen_adapter

    @property
    def champion(self) -> Champion | None:
        """The champion that a request is about."""
        return self.request.champion if isinstance(self.request, EvaluateRequest) else None

    def evaluation_model_with(self, adapter: ArtifactRef) -> Any:
        """The model that evaluates, with this adapter."""
        champion = self.champion
        if champion is None:
            return self.model_with(adapter)
        model = attach(self.backbone, champion.config, seed=0)
        load_state(model, self.get_adapter(champion.adapter))
        return model

    def _with_shared_posts(self, plan: StudyPlan) -> StudyPlan:
        """Judge shared posts, and tell only that something was refused: their share is a number about private data."""
        judged = super()._with_shared_posts(plan)
        before, after = plan.domains[0].refusals, judged.domains[0].refusals
        found = [reason for reason in after if reason not in before]
        if not found:
            return plan
        told = [self.outward(reason) for reason in found]
        domain = refused(plan.domains[0], *dict.fromkeys(told))
        return plan.model_copy(update={"domains": (domain,), "refusals": domain.refusals})

    def outward(self, refusal: str) -> str:
        """That the rule on shared posts refuses; why, only the site's own log and ledger say."""
        _log.warning("refused: %s", refusal)
        return (
            f"domain {self.domain!r}: the site's rule on posts that several accounts hold refuses this study; the "
            "site's own log and ledger say why."
        )
