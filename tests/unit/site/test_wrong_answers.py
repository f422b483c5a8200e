"""Whole studies in which one site answers wrongly, under its own good signature: the other one's round goes on."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from two_sites import Sites, server_of

from fedmentor_core.adapters.lora import metadata_from_bytes, state_from_bytes, state_to_bytes
from fedmentor_core.records import ClientUpdate
from fedmentor_core.rounds import find_manifest
from fedmentor_core.site.answering import answer_request
from fedmentor_core.site.requests import Answer, SignedAnswer, TrainRequest, answer_key
from fedmentor_core.site.signing import make_key_file, read_key_file, sign
from fedmentor_core.storage.local import LocalStore
from fedmentor_core.study import run_study

pytestmark = pytest.mark.usefixtures("light")
BAD = "site-b"
Spoil = Callable[["Liar", TrainRequest, SignedAnswer], SignedAnswer | bytes]


class Liar:
    """Delivers requests to the real code of both sites; site-b's answer to its training is then replaced."""

    def __init__(self, sites: Sites, spoil: Spoil, rounds: tuple[int, ...] = (0,)) -> None:
        self.sites, self.spoil, self.rounds = sites, spoil, rounds
        self.honest: dict[int, SignedAnswer] = {}

    def deliver(self, site, settings, request, answered) -> None:
        self.sites.deliver(site, settings, request, answered)
        if site != BAD or request.kind != "train":
            return
        path = Path(self.sites.file(site).store.url.removeprefix("file://")) / answer_key(site, request)
        honest = self.honest[request.assignment.round_index] = SignedAnswer.model_validate_json(path.read_bytes())
        if request.assignment.round_index in self.rounds:
            made = self.spoil(self, request, honest)
            path.unlink()
            path.write_bytes(made if isinstance(made, bytes) else made.model_dump_json().encode())

    def signed(self, answer: Answer) -> SignedAnswer:
        return sign(answer, read_key_file(self.sites.folder / BAD / "site.key"))

    def with_tensors(self, honest: SignedAnswer, change: Callable[[torch.Tensor], torch.Tensor]) -> SignedAnswer:
        """An answer whose update, header and digest are in order, and whose tensors are not."""
        update = honest.answer.result
        assert isinstance(update, ClientUpdate)
        store = Path(self.sites.file(BAD).store.url.removeprefix("file://"))
        good = (store / update.update.key).read_bytes()
        state = {name: change(tensor) for name, tensor in state_from_bytes(good).items()}
        data = state_to_bytes(state, metadata_from_bytes(good))
        ref = LocalStore(store).put(f"{update.update.key.rsplit('/', 1)[0]}/wrong.safetensors", data)
        result = update.model_copy(update={"update": ref, "bytes_up": ref.n_bytes})
        return self.signed(honest.answer.model_copy(update={"result": result}))


def one_value(value: float) -> Spoil:
    def spoil(liar: Liar, request: TrainRequest, honest: SignedAnswer) -> SignedAnswer:
        def change(tensor: torch.Tensor) -> torch.Tensor:
            changed = tensor.clone()
            changed.view(-1)[0] = value
            return changed

        return liar.with_tensors(honest, change)

    return spoil


def transposed(liar, request, honest):
    return liar.with_tensors(honest, lambda tensor: tensor.T.contiguous())


def cut(liar, request, honest):
    return liar.with_tensors(honest, lambda tensor: tensor[:-1].contiguous())


def whole_numbers(liar, request, honest):
    return liar.with_tensors(honest, lambda tensor: tensor.to(torch.int32))


def unsigned(liar, request, honest):
    return honest.answer.model_dump_json().encode()


def signed_by_another(liar, request, honest):
    make_key_file(liar.sites.folder / "other.key")
    return sign(honest.answer, read_key_file(liar.sites.folder / "other.key"))


def of_the_round_before(liar, request, honest):
    return liar.honest[request.assignment.round_index - 1]


def without_what_paid(liar, request, honest):
    result = honest.answer.result.model_copy(update={"ledger_entry": ""})
    return liar.signed(honest.answer.model_copy(update={"result": result}))


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (transposed, " torch.float32, expected ("),
        (cut, "bytes, expected"),
        (whole_numbers, "int32"),
        (one_value(float("nan")), "NaN"),
        (one_value(float("inf")), "infinity"),
        (one_value(1e6), "max_update_norm"),
        (unsigned, "no signed answer"),
        (signed_by_another, "signature"),
        (without_what_paid, "no ledger entry"),
    ],
    ids=["transposed", "cut", "whole numbers", "nan", "infinite", "norm", "unsigned", "another key", "no entry"],
)
def test_a_wrong_answer_is_rejected_and_the_round_goes_on(spoil, told, tiny_study, sites, tmp_path, store_url):
    workspace, engine = server_of(tiny_study, sites, tmp_path / "out", store_url, rounds=1)
    engine.deliver = Liar(sites, spoil).deliver
    summary = run_study(workspace.ref, engine)
    one, two = summary.rounds[0].clients
    assert (one.status, two.status) == ("trained", "rejected")
    assert told in two.reason
    assert two.epsilon_spent > 0, "it was charged at the site, whatever became of it"
    assert alone(workspace, sites, "one", summary.rounds[0]), "nothing of the rejected update is in the average"


def alone(workspace, sites, domain, round_summary) -> bool:
    """Whether the round's adapter is one client's update and nothing else."""
    manifest = find_manifest(workspace, round_summary.round_index)
    folder = f"sites/site-a/{domain}/runs/{workspace.ref.run_id}/rounds/0000/clients/{domain}"
    sent = state_from_bytes(workspace.store.get_bytes(f"{folder}/update-000.safetensors"))
    made = workspace.get_adapter(manifest.adapter)
    return all(torch.equal(sent[name], made[name]) for name in sent)


def test_another_rounds_update_is_rejected(tiny_study, sites, tmp_path, store_url):
    workspace, engine = server_of(tiny_study, sites, tmp_path / "out", store_url)
    engine.deliver = Liar(sites, of_the_round_before, rounds=(1,)).deliver
    summary = run_study(workspace.ref, engine)
    assert [client.status for client in summary.rounds[0].clients] == ["trained", "trained"]
    assert [client.status for client in summary.rounds[1].clients] == ["trained", "rejected"]
    assert "another request" in summary.rounds[1].clients[1].reason


def test_who_answers_twice_is_counted_once(tiny_study, sites, tmp_path, store_url):
    """The site's worker takes the same request up twice: the first answer stands, and nothing is charged again."""
    workspace, engine = server_of(tiny_study, sites, tmp_path / "out", store_url, rounds=1)

    def twice(site, settings, request, answered):
        sites.deliver(site, settings, request, answered)
        entries = ledger_entries(sites, site)
        before = {path: path.read_bytes() for path in stored_answers(store_url)}
        assert answer_request(request, sites.file(site)) is None
        assert ledger_entries(sites, site) == entries
        assert {path: path.read_bytes() for path in stored_answers(store_url)} == before

    engine.deliver = twice
    summary = run_study(workspace.ref, engine)
    assert [client.status for client in summary.rounds[0].clients] == ["trained", "trained"]


def ledger_entries(sites: Sites, site: str) -> list[Path]:
    return sorted((sites.folder / site / "ledger").rglob("*.json"))


def stored_answers(store_url: str) -> list[Path]:
    return sorted(Path(store_url.removeprefix("file://")).rglob("answers/*.json"))
