"""What a server takes back from a site and what it refuses; the site's code and the server's are the real ones."""

import json
import math
from pathlib import Path

import pytest

from fedmentor_core.adapters.lora import state_from_bytes, state_to_bytes
from fedmentor_core.errors import AnswerRejectedError, SiteError
from fedmentor_core.records import ArtifactRef, ClientUpdate
from fedmentor_core.rounds import RoundState, aggregate, assignments_for
from fedmentor_core.site.answering import answer_request
from fedmentor_core.site.asking import ask_evaluation, ask_plan, ask_training
from fedmentor_core.site.checking import find_answer
from fedmentor_core.site.requests import Answer, SignedAnswer, TrainRequest, answer_key, told_to_site
from fedmentor_core.site.signing import make_key_file, read_key_file, sign
from fedmentor_core.wire.traffic import update_metadata


def assignment(server, domain="one", **wishes):
    made = next(one for one in assignments_for(server, RoundState.first(server)) if one.domain == domain)
    return made.model_copy(update=wishes)


def training(server, domain="one", **wishes) -> TrainRequest:
    return TrainRequest(
        run_id=server.ref.run_id,
        domain=domain,
        config=told_to_site(server.config, server.config.domain(domain)),
        assignment=assignment(server, domain, **wishes),
        frozen_adapter=server.frozen_adapter,
    )


def test_a_round_at_two_sites_gives_two_updates_that_count(server, sites):
    updates = [ask_training(server, assignment(server, name), sites.deliver) for name in ("one", "two")]
    adapter, judged = aggregate(server, server.initial_adapter.trained, updates)
    assert [update.status for update in judged] == ["trained", "trained"]
    assert adapter != server.initial_adapter.trained
    assert [update.update.key.split("/")[1] for update in updates] == ["site-a", "site-b"]
    assert not list((Path(server.ref.out_dir)).rglob("ledgers")), "no ledger at the server"
    assert (sites.folder / "site-a" / "ledger" / "ledgers" / "one").is_dir()


def test_asked_again_a_site_is_not_asked_again(server, sites):
    first = ask_training(server, assignment(server), sites.deliver)
    sites.delivered.clear()
    assert ask_training(server, assignment(server), sites.deliver) == first
    assert sites.delivered == []
    entries = list((sites.folder / "site-a" / "ledger" / "ledgers" / "one").iterdir())
    assert answer_request(training(server), sites.file("site-a")) is None
    assert list((sites.folder / "site-a" / "ledger" / "ledgers" / "one").iterdir()) == entries, "charged twice"


def test_nothing_of_a_site_but_the_closed_list_reaches_the_server(server, sites, store_url):
    ask_training(server, assignment(server), sites.deliver)
    ask_evaluation(server, server.untrained_adapter, "one", "gate", sites.deliver)
    folder = Path(store_url.removeprefix("file://"))
    seen = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    asked = "".join(request.model_dump_json() for _, request in sites.delivered).encode()
    for where in (seen, asked, server.config.model_dump_json().encode()):
        assert str(sites.folder).encode() not in where
        assert b"site.key" not in where
        assert b"policy.yaml" not in where


def test_requests_hold_no_place_of_the_server(server, sites):
    ask_training(server, assignment(server), sites.deliver)
    for _, request in sites.delivered:
        text = request.model_dump_json()
        assert server.ref.out_dir not in text
        assert server.store.url not in text
        assert [domain.name for domain in request.config.domains] == [request.domain]


def answered(server, sites, request=None) -> tuple[TrainRequest, SignedAnswer]:
    """A request and the site's honest answer, taken out of the store so that another can be put in its place."""
    request = request or training(server)
    assert answer_request(request, sites.file("site-a")) is None
    path = stored(server, request)
    signed = SignedAnswer.model_validate_json(path.read_bytes())
    path.unlink()
    return request, signed


def stored(server, request) -> Path:
    return Path(server.store.url.removeprefix("file://")) / answer_key("site-a", request)


def resigned(signed: SignedAnswer, sites, key=None, **changes) -> SignedAnswer:
    key = key or read_key_file(sites.folder / "site-a" / "site.key")
    return sign(signed.answer.model_copy(update=changes), key)


def with_update(signed: SignedAnswer, sites, **changes) -> SignedAnswer:
    return resigned(signed, sites, result=signed.answer.result.model_copy(update=changes))


def rejected(server, request, content: SignedAnswer | bytes) -> str:
    data = content if isinstance(content, bytes) else content.model_dump_json().encode()
    path = stored(server, request)
    path.write_bytes(data)
    with pytest.raises(AnswerRejectedError) as told:
        find_answer(server, "site-a", request)
    path.unlink()
    return str(told.value)


def test_the_honest_answer_passes(server, sites):
    request, signed = answered(server, sites)
    server.store.put_json(answer_key("site-a", request), signed)
    assert find_answer(server, "site-a", request) == signed.answer.result


def test_another_signature_never_counts(server, sites, tmp_path):
    request, signed = answered(server, sites)
    make_key_file(tmp_path / "other.key")
    other = read_key_file(tmp_path / "other.key")
    assert "signature" in rejected(server, request, resigned(signed, sites, other))
    assert "signature" in rejected(server, request, signed.model_copy(update={"signature": "0" * 128}))
    changed = signed.answer.model_copy(update={"result": signed.answer.result.model_copy(update={"seconds": 1.0})})
    assert "signature" in rejected(server, request, signed.model_copy(update={"answer": changed}))
    unsigned = signed.answer.model_dump_json().encode()
    assert "no signed answer" in rejected(server, request, unsigned)
    assert "no signed answer" in rejected(server, request, b"not JSON")
    nan = json.loads(signed.model_dump_json())
    nan["answer"]["result"]["seconds"] = math.nan
    assert "signature" in rejected(server, request, json.dumps(nan).encode())
    assert "bytes" in rejected(server, request, b" " * (5 * 2**20))


def test_another_request_answered_never_counts(server, sites):
    request, signed = answered(server, sites)
    assert "another request" in rejected(server, request, resigned(signed, sites, request_sha256="0" * 64))
    assert "another request" in rejected(server, request, resigned(signed, sites, site="site-b"))
    plan = server.plan.domains[0]
    assert "DomainPlan" in rejected(server, request, resigned(signed, sites, result=plan))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"run_id": "another-study"}, "run_id"),
        ({"round_index": 1}, "round_index"),
        ({"domain": "two"}, "domain"),
        ({"base_adapter_sha256": "0" * 64}, "base_adapter_sha256"),
        ({"n_units": 10**6}, "n_units"),
        ({"noise_multiplier": 0.31}, "noise_multiplier"),
        ({"clip_norm": 50.0}, "clip_norm"),
        ({"steps": 1}, "steps"),
        ({"status": "rejected"}, "only 'trained' or 'rested'"),
        ({"update": None}, "only 'trained' or 'rested'"),
        ({"bytes_up": 7}, "bytes"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_update_that_was_not_asked_for_never_counts(server, sites, changes, told):
    request, signed = answered(server, sites)
    assert told in rejected(server, request, with_update(signed, sites, **changes))


def test_bytes_that_are_not_this_rounds_never_count(server, sites):
    request, signed = answered(server, sites)
    update: ClientUpdate = signed.answer.result
    state = state_from_bytes(server.store.get(update.update))
    folder = update.update.key.rsplit("/", 1)[0]

    def told_of(key: str, data: bytes, **ref) -> str:
        made = server.store.put(key, data)
        return rejected(server, request, with_update(signed, sites, update=made.model_copy(update=ref)))

    base = request.assignment.global_adapter.sha256
    right = update_metadata(server.ref.run_id, 0, base)
    for number, wrong in enumerate(
        (
            update_metadata("tiny-00000000", 0, base),
            update_metadata(server.ref.run_id, 1, base),
            update_metadata(server.ref.run_id, 0, "0" * 64),
        )
    ):
        assert "header" in told_of(f"{folder}/header-{number}.safetensors", state_to_bytes(state, wrong))
    assert "own folder" in told_of("runs/elsewhere.safetensors", state_to_bytes(state, right))
    assert "bytes" in told_of(f"{folder}/short.safetensors", b"short")
    good = state_to_bytes(state, right)
    assert "not those that it signed" in told_of(f"{folder}/digest.safetensors", good, sha256="0" * 64)
    gone = ArtifactRef(key=f"{folder}/gone.safetensors", sha256=update.update.sha256, n_bytes=update.update.n_bytes)
    assert "not in the store" in rejected(server, request, with_update(signed, sites, update=gone))


@pytest.mark.parametrize(("value", "told"), [(math.nan, "NaN"), (1e7, "max_update_norm")], ids=["nan", "norm"])
def test_tensors_that_spoil_an_average_are_rejected_where_they_are_added(server, sites, value, told):
    import torch

    update = ask_training(server, assignment(server), sites.deliver)
    state = state_from_bytes(server.store.get(update.update))
    spoilt = {name: torch.full_like(tensor, value) for name, tensor in state.items()}
    ref = server.store.put("sites/site-a/spoilt", state_to_bytes(spoilt))
    other = ask_training(server, assignment(server, "two"), sites.deliver)
    wrong = update.model_copy(update={"update": ref})
    _, judged = aggregate(server, server.initial_adapter.trained, [wrong, other])
    assert [one.status for one in judged] == ["rejected", "trained"]
    assert told in judged[0].reason


def test_a_rejected_answer_is_asked_for_anew_and_trained_once(server, sites):
    request = training(server)
    stored(server, request).parent.mkdir(parents=True, exist_ok=True)
    stored(server, request).write_bytes(b"planted by someone")
    update = ask_training(server, assignment(server), sites.deliver)
    assert update.status == "trained"
    assert [one.attempt for _, one in sites.delivered if one.kind == "train"] == [1]
    again = ask_training(server, assignment(server), sites.deliver)
    assert again == update


def test_a_site_that_ends_without_an_answer_is_said_so(server, sites):
    with pytest.raises(SiteError, match="without an answer"):
        ask_training(server, assignment(server), lambda *_: None)


def test_answer_cannot_be_written_twice(server, sites):
    request, signed = answered(server, sites)
    server.store.put_json(answer_key("site-a", request), signed)
    before = stored(server, request).read_bytes()
    answer_request(request, sites.file("site-a"))
    assert stored(server, request).read_bytes() == before


def test_a_plan_that_is_not_the_studys_never_counts(tiny_study, server, sites):
    request = next(one for site, one in sites.delivered if one.kind == "plan" and site == "site-a")
    path = stored(server, request)
    signed = SignedAnswer.model_validate_json(path.read_bytes())
    for changes in ({"epsilon_budget": 1.0}, {"rounds": 9}, {"sample_rate": 3.0}, {"n_units": 0}, {"domain": "two"},
                    {"rdp_budget": None}, {"clip_norm": 9.0}):  # fmt: skip
        assert rejected(server, request, with_update(signed, sites, **changes))
    assert isinstance(signed.answer, Answer)


def test_an_evaluation_that_was_not_asked_for_never_counts(server, sites):
    found = ask_evaluation(server, server.untrained_adapter, "one", "gate", sites.deliver)
    request = next(one for _, one in sites.delivered if one.kind == "evaluate")
    signed = SignedAnswer.model_validate_json(stored(server, request).read_bytes())
    metrics = found.metrics
    for changes in (
        {"split": "test"},
        {"domain": "two"},
        {"metrics": metrics.model_copy(update={"safe_rate": 1.5})},
        {"metrics": metrics.model_copy(update={"n_examples": 10**6})},
        {"samples": found.samples * 50},
    ):
        assert rejected(server, request, with_update(signed, sites, **changes))


def test_ask_plan_of_a_site_that_is_down(server, sites):
    sites.down.add("site-b")
    with pytest.raises(SiteError, match="down"):
        ask_plan(server.__class__(server.ref.model_copy(update={"run_id": "tiny-other"})), "two", sites.deliver)
