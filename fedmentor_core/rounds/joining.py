"""What the server accepts of a round's updates, and the adapter that it makes of them."""

from collections.abc import Mapping, Sequence
from functools import partial

from fedmentor_core.adapters.base_delta import is_delta
from fedmentor_core.adapters.lora import State, trained_part
from fedmentor_core.aggregation import find_rule
from fedmentor_core.aggregation.arriving import Source, arriving
from fedmentor_core.aggregation.base import JoinRule, StreamedRule, Updates, check_update, normalised
from fedmentor_core.aggregation.server import server_step
from fedmentor_core.aggregation.spool import spooled
from fedmentor_core.aggregation.weights import raw_weights
from fedmentor_core.errors import FedMentorError, UpdateRejectedError
from fedmentor_core.privacy.output import noise_norm
from fedmentor_core.records import ArtifactRef, ClientUpdate
from fedmentor_core.wire.update import Base
from fedmentor_core.workspace import Workspace


def aggregate(
    workspace: Workspace, base: ArtifactRef, updates: Sequence[ClientUpdate]
) -> tuple[ArtifactRef, list[ClientUpdate]]:
    """Check each update, join those that pass by the configured rule, take the server's step, store what comes of it.

    Where the rule allows it, updates are joined while they are read and checked, each once and none in memory whole.
    Where one does not pass, or the rule must see several at once, each is read to check it and again to join it.

    Returns:
        The new adapter (the old one when every client rested) and the updates with rejected ones marked.

    Raises:
        FedMentorError: some clients trained, yet fewer usable updates than ``aggregation.min_clients`` or the rule
            needs.
    """
    config = workspace.config.aggregation
    rule = find_rule(config.rule)
    global_state = workspace.get_adapter(base)
    round_index = updates[0].round_index
    starts = {
        domain: Base(base.sha256, trained_part(global_state, workspace.config.adapter_of(domain), round_index))
        for domain in {update.domain for update in updates}
    }
    before = trained_part(global_state, workspace.config.adapter, round_index)
    added = {name: tensor for name, tensor in global_state.items() if is_delta(name)}
    joined = _join_in_one_reading(workspace, rule, {**before, **added}, starts, updates)
    judged = list(updates)
    if joined is None:
        judged = [_check(workspace, update, starts[update.domain]) for update in updates]
    usable = [update for update in judged if update.status == "trained"]
    if all(update.status == "rested" for update in judged):
        return base, judged
    least = rule.least_clients(config)
    if len(usable) < max(config.min_clients, least):
        problems = "; ".join(f"{update.domain}: {update.reason or update.status}" for update in judged)
        asked = f"aggregation.rule {rule.name!r} needs {least}" if least > config.min_clients else ""
        raise FedMentorError(
            f"round {round_index}: {len(usable)} usable updates, "
            f"{asked or f'aggregation.min_clients is {config.min_clients}'} ({problems}). Finished updates are kept; "
            "run again to retry the others."
        )
    if joined is None:
        joined = _join_judged(workspace, rule, {**before, **added}, starts, usable)
    memory: State | None = None
    if config.server != "none":
        joined, memory = server_step(config, before, joined, workspace.server_memory(base))
    held = {name for name in global_state if name not in before and not is_delta(name)}
    kept = {name: global_state[name] for name in held}
    return workspace.put_adapter({**kept, **joined}, held=held, server_memory=memory, after=base.sha256), judged


def _join_in_one_reading(
    workspace: Workspace,
    rule: JoinRule,
    before: State,
    starts: Mapping[str, Base],
    updates: Sequence[ClientUpdate],
) -> State | None:
    """The joined adapter, where the rule can join while it checks and every update passes; else None.

    It is what judging each update first and joining then would give, to the bit, at half the bytes.
    """
    config = workspace.config
    trained = [update for update in updates if update.status == "trained"]
    least = max(config.aggregation.min_clients, rule.least_clients(config.aggregation))
    if not isinstance(rule, StreamedRule) or not trained or len(trained) < least:
        return None
    weights = dict(normalised(raw_weights(config.aggregation, config.privacy.level, trained)))
    try:
        sources = {
            update.domain: Source(
                weight=weights[update.domain],
                expected=starts[update.domain].state,
                max_update_norm=_largest_norm(workspace, update, starts[update.domain].state),
                pieces=partial(workspace.stream_update, _ref_of(workspace, update, starts[update.domain])),
                decode=workspace.update_decoder(starts[update.domain]),
            )
            for update in trained
        }
        return rule.join_arriving(before, arriving(sources))
    except FedMentorError:
        return None  # which update it was, and why, is for the judgement of each by itself


def _join_judged(
    workspace: Workspace, rule: JoinRule, before: State, starts: Mapping[str, Base], usable: Sequence[ClientUpdate]
) -> State:
    """Join updates that each passed."""
    config = workspace.config
    weights = dict(normalised(raw_weights(config.aggregation, config.privacy.level, usable)))
    refs = {update.domain: update.update for update in usable if update.update is not None}
    fetch = {domain: partial(workspace.update_to_file, ref, starts[domain]) for domain, ref in refs.items()}
    with spooled(fetch) as read_some:
        reader = Updates(weights, lambda domain: workspace.get_update(refs[domain], starts[domain]), read_some)
        return rule.join(config.aggregation, config.adapter.scale, before, reader)


def _check(workspace: Workspace, update: ClientUpdate, start: Base) -> ClientUpdate:
    if update.status != "trained":
        return update
    try:
        state = workspace.get_update(_ref_of(workspace, update, start), start)
        check_update(update.domain, state, start.state, _largest_norm(workspace, update, start.state))
    except FedMentorError as error:
        return update.model_copy(update={"status": "rejected", "reason": str(error)})
    return update


def _ref_of(workspace: Workspace, update: ClientUpdate, start: Base) -> ArtifactRef:
    """Where an update is, if it belongs to this round.

    Raises:
        UpdateRejectedError: it belongs to another study or round.
    """
    if update.update is None or update.run_id != workspace.ref.run_id:
        raise UpdateRejectedError(f"update of {update.domain!r} rejected: it belongs to another study.")
    if update.base_adapter_sha256 != start.sha256:
        raise UpdateRejectedError(f"update of {update.domain!r} rejected: it starts from another round's adapter.")
    return update.update


def _largest_norm(workspace: Workspace, update: ClientUpdate, expected: State) -> float:
    return workspace.config.aggregation.max_update_norm + _expected_noise_norm(workspace, update, expected)


def _expected_noise_norm(workspace: Workspace, update: ClientUpdate, expected: State) -> float:
    """At client level the honest noise alone may exceed ``max_update_norm``."""
    if workspace.config.privacy.level == "unit" or update.noise_multiplier is None:
        return 0.0
    n_parameters = sum(tensor.numel() for tensor in expected.values())
    return 1.1 * noise_norm(update.noise_multiplier, update.clip_norm, n_parameters)
