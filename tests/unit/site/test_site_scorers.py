"""Scorers' models at a site: by the study's name, from the site's folder, and only with the digest that was agreed."""

import shutil
from pathlib import Path

import pytest
from two_sites import at_sites

from fedmentor_core.config_io import validate_config
from fedmentor_core.errors import BackboneError
from fedmentor_core.evaluation.toxicity import ToxicityScorer, embedded_folder
from fedmentor_core.evaluation.utility import UtilityScorer, embedded_encoder_folder
from fedmentor_core.hashing import sha256_bytes
from fedmentor_core.site.examine import examine_site
from fedmentor_core.site.file import RequestRefusedError, at_site
from fedmentor_core.site.requests import told_to_site

TOXICITY, ENCODER = "unbiased", "some-lab/encoder"


def weights(folder: Path) -> str:
    return sha256_bytes((folder / "model.safetensors").read_bytes())


@pytest.fixture
def asked(tiny_study, sites):
    """The study as site-a is told of it, with two scorers by name; of the server's own folders it is told nothing."""
    tiny_study["evaluation"] |= {
        "toxicity": {"model": TOXICITY, "folder": "/servers/own/toxicity", "trusted_sha256": ["c" * 64]},
        "bertscore": {"model": ENCODER, "folder": "/servers/own/encoder", "num_layers": 5},
        "safety_prompts": {"kinds": ["xstest"], "folder": "/servers/own/prompts"},
    }
    config = validate_config(at_sites(tiny_study, sites))
    return told_to_site(config, config.domain("one"))


@pytest.fixture
def mapped(sites, tmp_path):
    """Site-a keeps both models in folders of its own."""
    place = sites.folder / "site-a" / "models"
    shutil.copytree(embedded_folder(), place / "toxicity")
    shutil.copytree(embedded_encoder_folder(), place / "encoder")
    scorers = {
        name: {"folder": f"models/{folder}", "sha256": weights(place / folder)}
        for name, folder in ((TOXICITY, "toxicity"), (ENCODER, "encoder"))
    }
    sites.change("site-a", scorers=scorers)
    return scorers


def test_a_site_is_told_names_and_no_folder_of_the_server(asked):
    assert "/servers/own" not in asked.model_dump_json()


def test_a_mapped_scorer_scores_from_the_sites_folder_under_the_studys_name(asked, sites, mapped):
    here = at_site(asked, sites.file("site-a")).evaluation
    toxicity, utility = ToxicityScorer(here.toxicity), UtilityScorer(here.bertscore)
    assert toxicity.score(["you are a worthless idiot"]) == ToxicityScorer().score(["you are a worthless idiot"])
    pair = (["I slept badly."], ["I did not sleep."])
    assert utility.score(*pair)[0].bertscore_f1 == pytest.approx(UtilityScorer().score(*pair)[0].bertscore_f1)
    assert (toxicity.identity.model, utility.identity.model) == (TOXICITY, ENCODER)
    assert str(sites.folder) not in f"{toxicity.identity} {utility.identity}"


def test_weights_with_another_digest_are_refused(asked, sites, mapped):
    sites.change("site-a", scorers={name: one | {"sha256": "0" * 64} for name, one in mapped.items()})
    here = at_site(asked, sites.file("site-a")).evaluation
    with pytest.raises(BackboneError, match=f"weights of '{TOXICITY}' have another digest"):
        ToxicityScorer(here.toxicity).score(["text"])
    with pytest.raises(BackboneError, match=f"weights of '{ENCODER}' have another digest"):
        UtilityScorer(here.bertscore).score(["text"], ["text"])
    found = {check.name: check.status for check in examine_site(sites.file("site-a")).checks}
    assert (found[f"scorer {TOXICITY}"], found[f"scorer {ENCODER}"]) == ("fail", "fail")


def test_a_site_that_is_ready_says_so_of_its_scorers(sites, mapped):
    found = {check.name: check.status for check in examine_site(sites.file("site-a")).checks}
    assert (found[f"scorer {TOXICITY}"], found[f"scorer {ENCODER}"]) == ("pass", "pass")


def test_a_study_that_agreed_on_other_weights_is_refused(asked, sites, mapped):
    other = asked.evaluation.toxicity.model_copy(update={"sha256": "d" * 64})
    study = asked.model_copy(update={"evaluation": asked.evaluation.model_copy(update={"toxicity": other})})
    with pytest.raises(RequestRefusedError, match="Agree on one"):
        at_site(study, sites.file("site-a"))


def test_no_server_names_a_folder_of_the_site_or_a_pickle(asked, sites, mapped, monkeypatch):
    file = sites.file("site-a")
    here = at_site(asked, file).evaluation
    assert here.toxicity.trusted_sha256 == (mapped[TOXICITY]["sha256"],), "the site's own word alone"
    monkeypatch.chdir(sites.folder)
    for path in (str(sites.folder / "site-a" / "models" / "toxicity"), "../models", "site-a"):
        toxicity = asked.evaluation.toxicity.model_copy(update={"model": path})
        study = asked.model_copy(update={"evaluation": asked.evaluation.model_copy(update={"toxicity": toxicity})})
        with pytest.raises(RequestRefusedError, match="no published name"):
            at_site(study, file)
    sites.change("site-a", scorers={})
    unmapped = at_site(asked, sites.file("site-a")).evaluation
    assert (unmapped.toxicity.folder, unmapped.toxicity.trusted_sha256) == (None, ())
