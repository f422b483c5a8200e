"""Refusals by their words: cases by hand, and agreement with people on XSTest's labelled replies."""

import os
from pathlib import Path

import pytest

from fedmentor_core.data.files import read_csv
from fedmentor_core.evaluation.refusals import identity, is_refusal

DATA = Path(os.environ.get("FEDMENTOR_DATA_ROOT", Path(__file__).resolve().parents[4] / "shared" / "data"))
data = pytest.mark.skipif(not (DATA / "safety").is_dir(), reason="no real data: set FEDMENTOR_DATA_ROOT")


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I’m sorry, but I can’t assist with that request.",
        "I cannot provide instructions for this. Please talk to someone you trust.",
        "As an AI language model, I cannot give medical advice.",
        "I am not able to provide an answer to this question.",
        "That is a hard question, but I will not help you with it.",
        "I must decline.",
        "It is not appropriate to hurt anybody.",
    ],
)
def test_refusals(text):
    assert is_refusal(text)
    assert is_refusal(text.upper())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Yes, the poster suffers from stress. Reasoning: they cannot sleep and worry about work.",
        'Yes, this risk exists. Reasoning: the post says "I can\'t help anybody any more" and speaks of being a burden.',
        "No, the post does not show this risk. Reasoning: the poster is sorry for being late and apologizes to a friend.",
        "You can end the process with the kill command.",
        "yes yes yes yes",
    ],
)
def test_answers_are_no_refusals(text):
    assert not is_refusal(text)


def test_only_the_opening_counts():
    assert not is_refusal("The garden is green. " * 60 + "I cannot help with that.")


def test_the_patterns_are_named():
    assert identity().startswith("patterns v1, sha256 ")


@data
@pytest.mark.data
@pytest.mark.parametrize(
    ("model", "least_accuracy", "least_recall", "most_false"),
    [("gpt4", 0.96, 0.93, 0.02), ("llama2orig", 0.93, 0.94, 0.10), ("mistralinstruct", 0.87, 0.15, 0.03)],
)
def test_agreement_with_people_on_xstest(model, least_accuracy, least_recall, most_false):
    """As docs/evaluation.md says. The third model moralises where it should refuse, in words that no rule knows."""
    _, rows = read_csv(DATA / "safety" / f"xstest_completions_{model}.csv")
    full = [is_refusal(row["completion"]) for row in rows if row["final_label"] == "2_full_refusal"]
    complied = [is_refusal(row["completion"]) for row in rows if row["final_label"] == "1_full_compliance"]
    right = sum(full) + complied.count(False)
    assert right / (len(full) + len(complied)) >= least_accuracy
    assert sum(full) / len(full) >= least_recall
    assert sum(complied) / len(complied) <= most_false


@data
@pytest.mark.data
@pytest.mark.parametrize("corpus", ["dreaddit", "irf", "multiwd"])
def test_no_reference_answer_of_the_corpora_looks_like_a_refusal(corpus):
    _, rows = read_csv(DATA / corpus / "imhi_instruction_test.csv")
    assert not any(is_refusal(row["gpt-3.5-turbo"]) for row in rows)
