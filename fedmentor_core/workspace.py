"""What a study needs at hand on one machine, loaded lazily and once per process.

A ``StudyRef`` crosses task borders; a ``Workspace`` is what a process makes of it.
"""

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

from fedmentor_core.adapters.backbone import Backbone, load_backbone
from fedmentor_core.adapters.base_delta import is_delta
from fedmentor_core.adapters.lora import (
    State,
    adapter_state,
    attach,
    changes_nothing,
    cut_to_rank,
    factor_of,
    load_state,
    main_directions,
    resolved_targets,
    state_from_bytes,
    state_to_bytes,
    trained_factors,
    trained_part,
)
from fedmentor_core.adapters.parts import AdapterParts, Part
from fedmentor_core.adapters.shapes import AdapterShapes, shapes_from_files
from fedmentor_core.adapters.warm_start import fitted, read_pinned
from fedmentor_core.aggregation import find_rule
from fedmentor_core.champion import Champion, ChampionAtStart, fixed_champion
from fedmentor_core.config import AdapterConfig, DomainConfig
from fedmentor_core.errors import BudgetError, ConfigError
from fedmentor_core.hashing import derive_seed
from fedmentor_core.privacy.ledger import Ledger, Terms
from fedmentor_core.privacy.output import with_client_level_warning
from fedmentor_core.privacy.plan import plan_domain
from fedmentor_core.privacy.policy import SitePolicy, plan_under_policy, policy_of, under_policy
from fedmentor_core.privacy.precautions import missing_precautions, shared_ledger_refusal
from fedmentor_core.privacy.refusals import refused
from fedmentor_core.privacy.shared_posts import with_shared_posts
from fedmentor_core.privacy.verified_prefix import VerifiedPrefix
from fedmentor_core.records import (
    AdapterSummary,
    ArtifactRef,
    BackboneSummary,
    ClientUpdate,
    StudyPlan,
)
from fedmentor_core.storage.base import ArtifactStore, open_store
from fedmentor_core.study_ref import StudyRef
from fedmentor_core.training.client import TrainingSet
from fedmentor_core.wire.codecs import find_codec
from fedmentor_core.wire.envelope import decoded, encoded, shapes_of
from fedmentor_core.wire.traffic import Traffic
from fedmentor_core.wire.update import Base, decode_update

SITES_FOLDER = "sites"
"""First part of every key that a site writes."""

_workspaces: dict[str, "Workspace"] = {}
_workspaces_lock = threading.Lock()


def workspace_of(ref: StudyRef) -> "Workspace":
    """This process's workspace for a study; the backbone, data and scorers are loaded once."""
    with _workspaces_lock:
        key = f"{ref.run_id}@{ref.out_dir}"
        if key not in _workspaces:
            _workspaces[key] = Workspace(ref)
        return _workspaces[key]


@dataclass(frozen=True)
class InitialAdapter:
    """Round 0's adapter: new, from a pinned folder or the champion's; shipped once so that all start alike.

    ``trained`` holds what changes over the run, ``frozen`` what does not.
    """

    frozen: ArtifactRef
    trained: ArtifactRef
    n_trainable: int
    n_bytes: int
    targets: tuple[str, ...]


class Workspace:
    """Lazily loaded parts of a study in this process. Thread-safe."""

    def __init__(self, ref: StudyRef) -> None:
        """Nothing is loaded yet."""
        self.ref = ref
        self.config = ref.config
        self._lock = threading.RLock()
        self.evaluation_lock = threading.Lock()
        self.training_turns = threading.BoundedSemaphore(self.config.execution.max_parallel_clients)
        self._training_sets: dict[str, TrainingSet] = {}
        self._site_stores: dict[str, ArtifactStore] = {}
        self._verified: dict[str, VerifiedPrefix] = {}

    # --- places -------------------------------------------------------------------------------------------------

    @cached_property
    def store(self) -> ArtifactStore:
        """The study's artifact store."""
        return self._open(self.ref.store_url)

    @cached_property
    def ledger_store(self) -> ArtifactStore:
        """Where the privacy ledgers live."""
        url = self.config.privacy.ledger_url
        return self.store if url is None else self._open(url)

    def _open(self, url: str) -> ArtifactStore:
        return open_store(url, self.config.storage)

    def store_holding(self, key: str) -> ArtifactStore:
        """The store to read ``key`` from: a site's own, where the site has one and the key is in its folder."""
        folder, _, rest = key.partition("/")
        site = self.config.sites.get(rest.partition("/")[0]) if folder == SITES_FOLDER else None
        if site is None or site.store_url is None:
            return self.store
        with self._lock:
            if site.store_url not in self._site_stores:
                self._site_stores[site.store_url] = self._open(site.store_url)
            return self._site_stores[site.store_url]

    def ledger(self, domain: str) -> Ledger:
        """A domain's privacy account, to draw from: what was verified of it in this run here is not read again.

        Who answers for the whole account, as report, audit and lineage do, opens ``Ledger(ledger_store, domain)``.
        """
        return Ledger(self.ledger_store, domain, self._verified.setdefault(domain, VerifiedPrefix()))

    def newest_entry(self, domain: str) -> str:
        """Digest that stands for a domain's account as it is now; empty where it has no entry.

        Raises:
            LedgerError: the chain is broken.
        """
        chain = self.ledger(domain).chain()
        return chain[-1].sha256 if chain else ""

    def policy(self, domain: str) -> SitePolicy:
        """The domain's own policy as it is now: a file is read anew each time, for the site may change it any day."""
        return policy_of(self.config, self.config.domain(domain))

    def key(self, path: str) -> str:
        """Store key of something that belongs to this run."""
        return f"runs/{self.ref.run_id}/{path}"

    # --- models -------------------------------------------------------------------------------------------------

    @property
    def backbone(self) -> Backbone:
        """The frozen backbone, shared by everything in this process."""
        backbone = load_backbone(self.config.backbone)
        if self.config.execution.torch_threads is not None:
            import torch

            torch.set_num_threads(self.config.execution.torch_threads)
        return backbone

    def new_adapter_model(self, round_index: int = 0, domain: str | None = None) -> Any:
        """A fresh peft model on the shared backbone, for a round of a client; None: of the global adapter's rank."""
        seed = derive_seed(self.config.seed, "adapter")
        return attach(self.backbone, self.config.adapter_of(domain), seed, round_index)

    @property
    def initial_adapter(self) -> InitialAdapter:
        """Create or find round 0's adapter in the store."""
        with self._lock:
            return self._initial_adapter

    @cached_property
    def _initial_adapter(self) -> InitialAdapter:
        trained, frozen, targets = self._initial_states
        start = self._start({**frozen, **trained})
        if start is not None:
            trained = {name: tensor for name, tensor in start.items() if name not in frozen}
            frozen = {name: start[name] for name in frozen}
        trained_ref = self.put_adapter(trained)
        return InitialAdapter(
            frozen=self.put_adapter(frozen),
            trained=trained_ref,
            n_trainable=self.traffic.n_trainable(),
            n_bytes=trained_ref.n_bytes,
            targets=targets,
        )

    def _start(self, own: State) -> State | None:
        """All tensors that the study starts from, where it does not start anew."""
        config = self.config
        if config.start_from == "champion" and (champion := self.champion) is not None:
            self._check_backbone(champion)
            theirs, state = champion.config, self.get_adapter(champion.adapter)
            said = f"start_from 'champion': {champion.name!r} version {champion.version}"
        elif config.adapter.start_from is not None:
            theirs, state = read_pinned(config.adapter)
            said = f"adapter.start_from: {config.adapter.start_from!r}"
        else:
            return None
        corrects_base = find_rule(config.aggregation.rule).corrects_base
        return fitted(state, theirs, config.adapter, own, corrects_base=corrects_base, said=said)

    @cached_property
    def _initial_states(self) -> tuple[State, State, tuple[str, ...]]:
        model, adapter = self.new_adapter_model(), self.config.adapter
        state = adapter_state(model, trainable_only=False)
        if adapter.train == "core" and adapter.core_init == "weights":
            state |= main_directions(model, derive_seed(self.config.seed, "directions"))
        changing = trained_factors(adapter.train, 0) | trained_factors(adapter.train, 1)
        trained = {name: tensor for name, tensor in state.items() if factor_of(name) in changing}
        return trained, {n: t for n, t in state.items() if n not in trained}, resolved_targets(model)

    @property
    def frozen_adapter(self) -> ArtifactRef:
        """The factors that nobody trains, the same for all clients."""
        return self.initial_adapter.frozen

    @property
    def untrained_adapter(self) -> ArtifactRef:
        """An adapter with B (or the core) zero, which changes nothing: with it a model is its backbone."""
        with self._lock:
            return self.put_adapter(self._initial_states[0])

    @property
    def champion(self) -> Champion | None:
        """The champion as it was when the study started; None where there was none.

        Raises:
            ConfigError: nobody has looked it up, because the study runs without MLflow.
        """
        with self._lock:
            return self._champion_at_start.champion

    @cached_property
    def _champion_at_start(self) -> ChampionAtStart:
        found = fixed_champion(self)
        if found is None:
            raise ConfigError(
                "start_from or a threshold names the champion, which only MLflow's registry knows: run the study with "
                "'fedmentor run', or compare with 'baseline' and start from 'backbone'."
            )
        return found

    def _check_backbone(self, champion: Champion) -> None:
        if champion.backbone_sha256 != self.backbone.sha256:
            raise ConfigError(
                f"start_from 'champion': {champion.name!r} version {champion.version} belongs to another backbone "
                f"(sha256 {champion.backbone_sha256[:12]}, this study has {self.backbone.sha256[:12]}). Give the "
                "champion's backbone, or set start_from to 'backbone'. Nothing was charged."
            )

    @property
    def resolved_adapter(self) -> AdapterConfig:
        """The adapter's configuration with its target modules by name."""
        return self.resolved_adapter_of(None)

    def resolved_adapter_of(self, domain: str | None) -> AdapterConfig:
        """The adapter's configuration as a client trains it, with its target modules by name."""
        with self._lock:
            return self.config.adapter_of(domain).model_copy(update={"target_modules": self._initial_states[2]})

    def put_adapter(
        self,
        state: State,
        *,
        held: Collection[str] = (),
        server_memory: State | None = None,
        after: str = "",
        exact: bool = False,
    ) -> ArtifactRef:
        """Store a global adapter under its own digest, in the codec ``wire.download``; parts of it stay exact.

        What it is from now on, for the server too, is what ``get_adapter`` reads. The same arguments give the same
        object.

        Args:
            state: tensors that change over the run, and what was added to the base, which becomes a part of its own.
            held: names of tensors that the last round left as they were: a part of their own, which clients have.
            server_memory: what the server's step is to remember.
            after: digest of the adapter that it follows; each has its own coins.
            exact: keep fp32 whatever is configured, for an adapter that is not this study's.
        """
        apart = {name: tensor for name, tensor in state.items() if name in held}
        base = {name: tensor for name, tensor in state.items() if is_delta(name)}
        own = {name: tensor for name, tensor in state.items() if name not in apart and name not in base}
        parts = AdapterParts(
            held=self._put_part(apart), base=self._put_part(base), server=self._put_part(server_memory or {})
        )
        codec = find_codec("fp32" if exact else self.config.wire.download)
        seed = derive_seed(self.config.seed, "rounding", after)
        return self._put_object(encoded(own, codec, seed=seed, metadata=parts.metadata()))

    def _put_part(self, state: State) -> Part | None:
        return Part.of(self._put_object(state_to_bytes(state))) if state else None

    def _put_object(self, data: bytes) -> ArtifactRef:
        from fedmentor_core.hashing import sha256_bytes

        return self.store.put(self.key(f"adapters/{sha256_bytes(data)}.safetensors"), data)

    def get_adapter(self, ref: ArtifactRef) -> State:
        """Read and verify a global adapter: its own tensors, those that were held, and what was added to the base."""
        store = self.store_holding(ref.key)
        data = store.get(ref)
        parts = AdapterParts.in_bytes(data)
        state = decoded(data)
        for part in (parts.held, parts.base):
            if part is not None:
                state |= state_from_bytes(store.get(part.beside(ref)))
        return state

    def get_update(self, ref: ArtifactRef, base: Base | None = None) -> State:
        """Read and verify a client's update: the tensors in this object and no other, whatever its header names.

        Args:
            ref: where it is.
            base: the global adapter that it must start from, at the client's rank; fp32 updates need none.

        Raises:
            IntegrityError: torn, or not in the codec ``wire.upload`` as a change of ``base``.
        """
        return decode_update(self.store_holding(ref.key).get(ref), find_codec(self.config.wire.upload), base)

    def stream_update(self, ref: ArtifactRef) -> Iterator[bytes]:
        """A client's update as it was sent, in pieces; the last one comes only if the digest is right."""
        return self.store_holding(ref.key).stream(ref)

    def update_decoder(self, base: Base) -> Callable[[bytes], State] | None:
        """How the bytes of an update become tensors; None: they are a plain safetensors file."""
        codec = find_codec(self.config.wire.upload)
        return None if codec.name == "fp32" else partial(decode_update, codec=codec, base=base)

    def update_to_file(self, ref: ArtifactRef, base: Base, path: Path) -> None:
        """``get_update`` to a safetensors file of fp32 tensors."""
        if self.config.wire.upload == "fp32":
            self.store_holding(ref.key).get_to_file(ref, path)
        else:
            path.write_bytes(state_to_bytes(self.get_update(ref, base)))

    def parts_of(self, adapter: ArtifactRef) -> AdapterParts:
        """What belongs to a global adapter beside its own object."""
        return AdapterParts.in_bytes(self.store_holding(adapter.key).get(adapter))

    def server_memory(self, adapter: ArtifactRef) -> State:
        """What the server's step remembers since it made this adapter; empty before its first."""
        part = self.parts_of(adapter).server
        return {} if part is None else state_from_bytes(self.store.get(part.beside(adapter)))

    def trained_part(self, adapter: ArtifactRef, round_index: int, domain: str) -> State:
        """What of a global adapter a client trains in a round, as it is before the round."""
        return trained_part(self.get_adapter(adapter), self.config.adapter_of(domain), round_index)

    def model_with(self, adapter: ArtifactRef, round_index: int = 0, domain: str | None = None) -> Any:
        """A fresh peft model with the frozen factors and this adapter loaded, ready for a round of a client."""
        model, rank = self.new_adapter_model(round_index, domain), self.config.adapter_of(domain).rank
        load_state(model, cut_to_rank(self.get_adapter(self.frozen_adapter), rank))
        load_state(model, cut_to_rank(self.get_adapter(adapter), rank))
        return model

    def full_adapter_state(self, adapter: ArtifactRef) -> State:
        """Frozen and trained tensors together, and what was added to the base."""
        return {**self.get_adapter(self.frozen_adapter), **self.get_adapter(adapter)}

    def evaluation_model_with(self, adapter: ArtifactRef) -> Any:
        """The model that evaluates, with this adapter; hold ``evaluation_lock`` while it is used.

        The champion may have another rank or other modules than this study's adapter: it gets a model of its own. An
        adapter that changes nothing gets the backbone alone, which computes the same, to the bit, and faster.
        """
        champion = self.champion if self.config.needs_champion else None
        if champion is not None and adapter == champion.adapter:
            model = attach(self.backbone, champion.config, seed=0)
            load_state(model, self.get_adapter(adapter))
            return model
        state = self.full_adapter_state(adapter)
        if changes_nothing(state):
            return self._bare_model
        load_state(self._evaluation_model, state)
        return self._evaluation_model

    @cached_property
    def _evaluation_model(self) -> Any:
        return self.new_adapter_model()

    @cached_property
    def _bare_model(self) -> Any:
        return self.backbone.share()

    @property
    def scorers(self) -> Any:
        """Utility and safety scorers."""
        with self._lock:
            return self._scorers

    @cached_property
    def _scorers(self) -> Any:
        from fedmentor_core.evaluation.scores import Scorers

        return Scorers.load(self.config.evaluation)

    # --- data ---------------------------------------------------------------------------------------------------

    @property
    def domains_here(self) -> tuple[DomainConfig, ...]:
        """The domains whose rows this process may read; the others are at their sites."""
        return tuple(domain for domain in self.config.domains if domain.site is None)

    @property
    def domains_at_sites(self) -> tuple[DomainConfig, ...]:
        """The domains that only their sites can plan, train and evaluate."""
        return tuple(domain for domain in self.config.domains if domain.site is not None)

    @property
    def data(self) -> Any:
        """Rows of every domain that is here, in train, gate and test splits."""
        with self._lock:
            return self._data

    @cached_property
    def _data(self) -> Any:
        from fedmentor_core.data.loading import load_study_data

        return load_study_data(self.domains_here, self.config.data)

    def training_set(self, domain: str) -> TrainingSet:
        """A domain's tokenised training rows by unit."""
        from fedmentor_core.data.encode import encode_for_training

        with self._lock:
            if domain not in self._training_sets:
                tokenizer = self.backbone.tokenizer
                encoded = encode_for_training(
                    tokenizer,
                    self.data[domain].train,
                    max_length=self.config.backbone.max_length,
                    max_target_tokens=self.config.training.max_target_tokens,
                )
                self._training_sets[domain] = TrainingSet(
                    input_ids=encoded.input_ids,
                    labels=encoded.labels,
                    rows_of_unit=encoded.rows_by_unit(),
                    pad_id=tokenizer.pad_token_id,
                )
            return self._training_sets[domain]

    def evaluation_set(self, domain: str, split: Literal["gate", "test"]) -> Any:
        """A domain's capped gate or test rows; which rows depends on the data seed alone.

        Of a private set whole units are chosen, with all their rows.
        """
        import random

        from fedmentor_core.data.encode import encode_for_training, encode_prompts
        from fedmentor_core.data.sources import answer_form_of
        from fedmentor_core.evaluation.scores import EvaluationSet
        from fedmentor_core.privacy.validation_plan import evaluated_units

        evaluation = self.config.evaluation
        table = getattr(self.data[domain], split)
        if evaluation.gate_data == "private":
            units = evaluated_units(self.config, domain, split, self.data[domain])
            chosen = [index for index, unit in enumerate(table["unit_id"][:]) if unit in units]
        else:
            limit = evaluation.max_gate_examples if split == "gate" else evaluation.max_test_examples
            chosen = sorted(
                random.Random(derive_seed(self.config.data.split_seed, split, domain)).sample(
                    range(len(table)), min(limit, len(table))
                )
            )
        rows = [table[index] for index in chosen]
        prompts = encode_prompts(
            self.backbone.tokenizer,
            rows,
            max_length=self.config.backbone.max_length,
            max_new_tokens=evaluation.max_new_tokens,
        )
        targets = None
        if evaluation.gate_data == "public":
            targets = encode_for_training(
                self.backbone.tokenizer,
                rows,
                max_length=self.config.backbone.max_length,
                max_target_tokens=self.config.training.max_target_tokens,
            )
        return EvaluationSet(
            domain=domain,
            split=split,
            rows=rows,
            prompts=prompts.input_ids,
            targets=targets,
            form=answer_form_of(self.config.domain(domain).source),
        )

    # --- plan and summaries ---------------------------------------------------------------------------------------

    @property
    def plan(self) -> StudyPlan:
        """The plan this run started with: stored once, so that a resumed run keeps it."""
        with self._lock:
            return self._plan

    @cached_property
    def _plan(self) -> StudyPlan:
        key = self.key("plan.json")
        if self.is_planned:
            return StudyPlan.model_validate(self.store.get_json(key))
        if self.domains_at_sites:
            raise ConfigError(
                f"the study is not planned yet: its sites must be asked first ({_names(self.domains_at_sites)}). Run "
                "it with 'fedmentor run' or its deployment."
            )
        plan = self.preflight()
        self.store.put_json(key, plan)
        return plan

    @property
    def is_planned(self) -> bool:
        """Whether this run has its plan."""
        return self.store.exists(self.key("plan.json"))

    def settle_plan(self, plan: StudyPlan) -> StudyPlan:
        """The plan this run started with; where there is none yet, it is ``plan`` from now on.

        Raises:
            BudgetError: no domain's budget carries it, or a private gate or test set's does not.
        """
        with self._lock:
            if not self.is_planned:
                self.store.put_json(self.key("plan.json"), carried(plan))
            return self._plan

    def preflight(self) -> StudyPlan:
        """Load backbone, adapter and data and plan, so that bad input is refused before anything is written.

        Of domains at sites nothing is known yet: their sites answer when the study starts.

        Raises:
            BackboneError, DataError, ConfigError: what cannot be loaded or does not fit.
            BudgetError: no domain's budget carries the plan, or a private gate or test set's does not.
        """
        with self._lock:
            return self._preflight

    @cached_property
    def _preflight(self) -> StudyPlan:
        plan = self.make_plan()
        return plan if self.domains_at_sites else carried(plan)

    @property
    def n_clients(self) -> int:
        """Clients of the whole study."""
        return len(self.config.domains)

    @property
    def traffic(self) -> Traffic:
        """What this run's adapters and updates weigh."""
        with self._lock:
            return self._traffic

    @cached_property
    def _traffic(self) -> Traffic:
        trained, frozen, targets = self._initial_states
        return self._traffic_of(
            AdapterShapes(
                trained=shapes_of(trained),
                frozen=shapes_of(frozen),
                targets=targets,
                backbone_sha256=self.backbone.sha256,
            )
        )

    def _traffic_of(self, shapes: AdapterShapes) -> Traffic:
        return Traffic(config=self.config, run_id=self.ref.run_id, n_clients=self.n_clients, shapes=shapes)

    def bytes_down(self, adapter: ArtifactRef, round_index: int) -> int:
        """What a client that took part so far reads to start a round; what nobody trains travels once."""
        base = self.parts_of(adapter).base
        once = self.frozen_adapter.n_bytes if round_index == 0 else 0
        return adapter.n_bytes + (0 if base is None else base.n_bytes) + once

    def make_plan(self, *, from_files: bool = False) -> StudyPlan:
        """Plan the domains that are here, from public numbers and the ledgers. Writes nothing.

        Args:
            from_files: load no backbone whose files on disk say enough for a plan (``adapters/shapes.py``). The plan is
                the same; that the model can be loaded is then not shown.
        """
        from fedmentor_core.privacy.validation_plan import check_disjoint_units, with_validation

        shared_ledger = shared_ledger_refusal(self.config)
        if shared_ledger is not None:
            raise ConfigError(shared_ledger + ".")
        if self.config.evaluation.gate_data == "private":
            check_disjoint_units(self.data)
        shapes = shapes_from_files(self.config.backbone, self.config.adapter) if from_files else None
        traffic = self.traffic if shapes is None else self._traffic_of(shapes)
        n_trainable, bytes_down, first = traffic.n_trainable(), traffic.bytes_down(), traffic.bytes_down(0)
        domains = []
        for domain in self.domains_here:
            data = self.data[domain.name]
            ledger = self.ledger(domain.name)
            policy = self.policy(domain.name)
            plan = plan_domain(
                self.config,
                under_policy(domain, policy),
                n_units=data.n_units["train"],
                dataset_fingerprint=data.fingerprint,
                bytes_up=traffic.bytes_up(domain.name),
                bytes_down=bytes_down,
                bytes_down_first=first,
                account_in_force=ledger.account(),
                spent_rdp=ledger.spent_rdp(),
                runs_before=ledger.runs_charged(besides=self.ref.run_id),
            )
            plan = with_validation(plan, self.config, self.data, self.ledger, self.ref.run_id)
            adapter = self.config.adapter_of(domain.name).model_copy(update={"target_modules": traffic.shapes.targets})
            plan = plan_under_policy(plan, policy, self.config, traffic.shapes.backbone_sha256, adapter)
            plan = with_client_level_warning(plan, n_trainable, self.n_clients)
            other_terms = ledger.terms_refusal(Terms.of(plan))
            domains.append(plan if other_terms is None else refused(plan, other_terms))
        made = StudyPlan(
            domains=tuple(domains),
            bytes_per_round=sum(d.bytes_up_per_round + d.bytes_down_per_round for d in domains),
            refusals=tuple(refusal for domain in domains for refusal in domain.refusals)
            + tuple(one.refusal for domain in domains for one in domain.validation if one.refusal),
            warnings=missing_precautions(self.config),
        )
        return self._with_shared_posts(made)

    def _with_shared_posts(self, plan: StudyPlan) -> StudyPlan:
        return with_shared_posts(plan, self.config, self.data, self.ledger_store)

    def outward(self, refusal: str) -> str:
        """How a refusal by the rule on shared posts is told: in full, since nothing leaves this machine."""
        return refusal

    def backbone_summary(self) -> BackboneSummary:
        """The backbone's line in ``summary.json``."""
        backbone = self.backbone
        return BackboneSummary(
            name=backbone.name, n_parameters=backbone.n_parameters, revision=backbone.revision, sha256=backbone.sha256
        )

    def adapter_summary(self) -> AdapterSummary:
        """The adapter's line in ``summary.json``."""
        initial, config = self.initial_adapter, self.config.adapter
        return AdapterSummary(
            rank=config.rank,
            alpha=config.alpha,
            target_modules=initial.targets,
            train=config.train,
            n_trainable=initial.n_trainable,
            n_bytes=initial.n_bytes,
        )


def carried(plan: StudyPlan) -> StudyPlan:
    """The plan itself, when at least one domain can train under it and every private set can be judged.

    Raises:
        BudgetError: otherwise.
    """
    if all(domain.refusals for domain in plan.domains):
        raise BudgetError("no domain can train:\n" + "\n".join(f"  {refusal}" for refusal in plan.refusals))
    unjudged = [one.refusal for domain in plan.domains for one in domain.validation if one.refusal]
    if unjudged:
        raise BudgetError("the gate cannot be judged:\n" + "\n".join(f"  {refusal}" for refusal in unjudged))
    return plan


def _names(domains: Sequence[DomainConfig]) -> str:
    return ", ".join(domain.name for domain in domains)


def find_update(workspace: Workspace, round_index: int, domain: str) -> ClientUpdate | None:
    """A client's finished update of a round, when there is one."""
    key = client_key(workspace, round_index, domain, "update.json")
    if not workspace.store.exists(key):
        return None
    return ClientUpdate.model_validate(workspace.store.get_json(key))


def client_key(workspace: Workspace, round_index: int, domain: str, name: str) -> str:
    """Store key of something of one client in one round."""
    return workspace.key(f"rounds/{round_index:04d}/clients/{domain}/{name}")
