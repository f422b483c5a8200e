"""Opacus' accountants are its own, to the bit, whether its training side was imported or not."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from fedmentor_core.privacy import opacus_accountants

HISTORIES = [[(0.6, 0.03, 16)], [(1.1, 0.01, 40), (0.9, 0.02, 7)], [(2.0, 1.0, 3)]]
CASES = [(0.5, 0.02, 1.3), (0.5, 0.02, 17.0), (1.7, 0.4, 2.5), (3.0, 1.0, 8.0), (0.8, 0.3, 63.0)]
PROGRAM = f"""
import json, sys
from fedmentor_core.privacy.opacus_accountants import prv_accountant, rdp_analysis
rdp = [float(rdp_analysis().compute_rdp(q=q, noise_multiplier=s, steps=3, orders=a)) for s, q, a in {CASES!r}]
prv = []
for history in {HISTORIES!r}:
    accountant = prv_accountant()()
    accountant.history = list(history)
    prv.append(float(accountant.get_epsilon(delta=1e-5)))
print(json.dumps([rdp, prv, sorted({{"opacus", "torch"}} & set(sys.modules))]))
"""


def test_alone_and_with_all_of_opacus_give_the_same_bits():
    from opacus.accountants import PRVAccountant
    from opacus.accountants.analysis.rdp import compute_rdp

    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=True)
    rdp, prv, loaded = json.loads(done.stdout)
    assert loaded == [], "neither torch nor Opacus' training side"
    assert rdp == [float(compute_rdp(q=q, noise_multiplier=s, steps=3, orders=a)) for s, q, a in CASES]
    for history, found in zip(HISTORIES, prv, strict=True):
        accountant = PRVAccountant()
        accountant.history = list(history)
        assert found == float(accountant.get_epsilon(delta=1e-5))


def test_where_opacus_is_loaded_it_is_used_itself():
    import opacus.accountants

    assert "opacus" in sys.modules
    assert opacus_accountants._load("prv").PRVAccountant is opacus.accountants.PRVAccountant


@pytest.mark.parametrize("locations", [None, []], ids=["not a folder", "no place"])
def test_another_layout_falls_back_to_the_import(monkeypatch, locations):
    class Found:
        submodule_search_locations = locations

    import opacus.accountants

    monkeypatch.setattr(opacus_accountants, "sys", SimpleNamespace(modules={}))  # as if Opacus were not loaded
    monkeypatch.setattr(opacus_accountants, "find_spec", lambda _: Found())
    assert opacus_accountants._load("analysis.rdp") is opacus.accountants.analysis.rdp
