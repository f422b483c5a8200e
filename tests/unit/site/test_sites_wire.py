"""Studies over sites in few bits: what a site sends and reads is what was agreed, to the letter of its header."""

from pathlib import Path
from typing import Any

import pytest
import torch
from two_sites import Sites, server_of

from fedmentor_core.adapters.lora import metadata_from_bytes, state_from_bytes, state_to_bytes
from fedmentor_core.errors import AnswerRejectedError
from fedmentor_core.records import ClientUpdate
from fedmentor_core.rounds import find_manifest
from fedmentor_core.site.checking import find_answer
from fedmentor_core.site.requests import Answer, SignedAnswer, TrainRequest, answer_key
from fedmentor_core.site.signing import read_key_file, sign
from fedmentor_core.study import run_study
from fedmentor_core.wire.envelope import KEY
from fedmentor_core.wire.update import update_seed

WIRE = {"upload": "int6", "download": "int8"}


@pytest.fixture
def over_sites(tiny_study: dict, sites: Sites, tmp_path: Path, store_url: str, light: None) -> Any:
    """The tiny study over two sites, finished, and the requests to train that were answered."""

    def run(**changes: Any) -> Any:
        workspace, engine = server_of(tiny_study, sites, tmp_path / "out", store_url, wire=WIRE, **changes)
        summary = run_study(workspace.ref, engine)
        assert [client.status for one in summary.rounds for client in one.clients] == ["trained"] * 4
        return workspace, summary

    return run


def test_sites_send_and_read_to_the_byte_what_was_planned(over_sites: Any) -> None:
    """The server's step is not the sites' business, yet the adapter's header names its memory, and they read that."""
    workspace, summary = over_sites(aggregation={"server": "momentum"})
    for index, one in enumerate(summary.rounds):
        for client, plan in zip(one.clients, workspace.plan.domains, strict=True):
            assert client.bytes_up == plan.bytes_up_per_round == workspace.traffic.bytes_up(client.domain, index)
            planned = plan.bytes_down_per_round if index else plan.bytes_down_first_round
            assert client.bytes_down == planned == workspace.traffic.bytes_down(index)
    found = find_manifest(workspace, 1).adapter
    assert '"codec":"int8"' in metadata_from_bytes(workspace.store.get(found))[KEY]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in workspace.get_adapter(found).values())


def test_sites_alternate_between_factors_in_few_bits(over_sites: Any) -> None:
    workspace, summary = over_sites(adapter={"rank": 4, "train": "alternate"})
    for index, one in enumerate(summary.rounds):
        for client in one.clients:
            assert client.bytes_up == workspace.traffic.bytes_up(client.domain, index)
            assert client.bytes_down == workspace.traffic.bytes_down(index)


FORMS = {
    "codec": ('"codec":"int6"', '"codec":"int8"'),
    "block": ('"block":64', '"block":32'),
    "version": ('"version":1', '"version":2'),
    "shape": ("[32,4]", "[4,32]"),
}


def test_a_signed_update_in_another_form_than_agreed_never_counts(over_sites: Any, sites: Sites) -> None:
    """The site holds its key and is broken or dishonest: its header must say what was agreed, to the letter."""
    workspace, _ = over_sites()
    request = next(one for site, one in sites.delivered if site == "site-a" and isinstance(one, TrainRequest))
    path = Path(workspace.ref.store_url.removeprefix("file://")) / answer_key("site-a", request)
    update = SignedAnswer.model_validate_json(path.read_bytes()).answer.result
    assert isinstance(update, ClientUpdate)
    assert find_answer(workspace, "site-a", request) == update
    honest = workspace.store.get(update.update)
    key = read_key_file(sites.folder / "site-a" / "site.key")
    dither = f"{update_seed(workspace.config.seed, update.round_index, update.domain, update.attempt):016x}"
    for form, (agreed, sent) in (FORMS | {"dither": (dither, dither[::-1])}).items():
        metadata = metadata_from_bytes(honest)
        assert agreed in metadata[KEY]
        metadata[KEY] = metadata[KEY].replace(agreed, sent)
        data = state_to_bytes(state_from_bytes(honest), metadata)
        ref = workspace.store.put(update.update.key.replace("update-", f"{form}-"), data)
        assert ref.n_bytes == update.update.n_bytes, "only its header can tell it apart"
        result = update.model_copy(update={"update": ref})
        answer = Answer(site="site-a", request_sha256=request.sha256, result=result)
        path.unlink()
        path.write_text(sign(answer, key).model_dump_json())
        with pytest.raises(AnswerRejectedError, match="wire format"):
            find_answer(workspace, "site-a", request)
