"""Sites train what the study's parametrisation says, at their own rank, from the corrected base, and know no place."""

from typing import Any

import pytest
import torch
from two_sites import Sites, at_sites

from fedmentor_core.adapters.lora import factor_of, state_from_bytes, state_to_bytes
from fedmentor_core.adapters.parts import AdapterParts, Part
from fedmentor_core.config_io import validate_config
from fedmentor_core.errors import NotFoundError
from fedmentor_core.rounds import find_manifest
from fedmentor_core.site.requests import told_to_site
from fedmentor_core.study import InProcess, run_study
from fedmentor_core.study_ref import open_study
from fedmentor_core.workspace import Workspace, workspace_of


@pytest.fixture
def over_sites(tiny_study: dict, sites: Sites, tmp_path: Any, store_url: str, light: None) -> Any:
    """Run the tiny study over two sites with sections changed."""

    def run(**changes: Any) -> Workspace:
        raw = at_sites(tiny_study, sites) | {"storage": {"url": store_url}}
        for key, value in changes.items():
            raw[key] = {**raw.get(key, {}), **value} if isinstance(value, dict) else value
        workspace = workspace_of(open_study(validate_config(raw), tmp_path / "out"))
        summary = run_study(workspace.ref, InProcess(workspace, deliver=sites.deliver))
        assert [client.status for one in summary.rounds for client in one.clients] == ["trained"] * 4
        return workspace

    return run


def sent(workspace: Workspace, sites: Sites, round_index: int) -> list[dict[str, torch.Tensor]]:
    """Each site's update of a round, as it lies in its folder."""
    found = []
    for site, domain in (("site-a", "one"), ("site-b", "two")):
        folder = f"sites/{site}/{domain}/runs/{workspace.ref.run_id}/rounds/{round_index:04d}"
        key = next(key for key in workspace.store.list_keys(folder) if key.endswith(".safetensors"))
        found.append(state_from_bytes(workspace.store.get_bytes(key)))
    return found


def test_sites_alternate_between_factors(over_sites: Any, sites: Sites) -> None:
    workspace = over_sites(adapter={"train": "alternate"})
    for index, factor in enumerate("BA"):
        for update in sent(workspace, sites, index):
            assert {factor_of(name) for name in update} == {factor}


def test_sites_train_on_the_corrected_base(over_sites: Any, sites: Sites) -> None:
    workspace = over_sites(adapter={"train": "both"}, aggregation={"rule": "fedex", "prox_mu": 0.5})
    first = find_manifest(workspace, 0)
    assert workspace.parts_of(first.adapter).base is not None
    downloads = {client.bytes_down for client in find_manifest(workspace, 1).summary.clients}
    assert downloads == {first.adapter.n_bytes + workspace.parts_of(first.adapter).base.n_bytes}
    told = [request.config.aggregation for _, request in sites.delivered]
    assert {(one.rule, one.prox_mu) for one in told} == {("fedex", 0.5)}


def test_a_site_trains_at_its_own_rank(over_sites: Any, sites: Sites, tiny_study: dict) -> None:
    tiny_study["domains"][1]["rank"] = 2
    workspace = over_sites(adapter={"train": "both"}, aggregation={"rule": "svd"})
    ranks = [
        {t.shape[0] for name, t in update.items() if factor_of(name) == "A"} for update in sent(workspace, sites, 1)
    ]
    assert ranks == [{4}, {2}]
    joined = workspace.get_adapter(find_manifest(workspace, 1).adapter)
    assert {t.shape[0] for name, t in joined.items() if factor_of(name) == "A"} == {4}


def test_a_site_is_not_told_where_a_start_lies(tiny_study: dict, sites: Sites) -> None:
    raw = at_sites(tiny_study, sites)
    raw["adapter"] = {**raw.get("adapter", {}), "start_from": "/somewhere/private", "start_sha256": "0" * 64}
    config = validate_config(raw)
    told = told_to_site(config, config.domains[0])
    assert told.adapter.start_from is None
    assert told.adapter.start_sha256 == "0" * 64
    assert "somewhere" not in told.model_dump_json()


def test_a_header_cannot_name_other_objects_for_an_update(server: Workspace, sites: Sites) -> None:
    """A dishonest site's parts are not followed: its own object is read and nothing else."""
    start = server.initial_adapter.trained
    state = server.get_adapter(start)
    parts = AdapterParts(held=Part(sha256="a" * 64, n_bytes=1))
    ref = server.store.put(f"runs/{server.ref.run_id}/adapters/x", state_to_bytes(state, parts.metadata()))
    assert set(server.get_update(ref)) == set(state)
    with pytest.raises(NotFoundError):  # as what it claims to be it would be followed
        server.get_adapter(ref)
