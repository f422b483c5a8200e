"""The server's part of a round: what to ask of each client, what to accept, what the gate's verdict changes.

Everything here is a function of released updates, public numbers and gate-set metrics; nothing touches training data.
"""

from fedmentor_core.rounds.commit import commit_round, now
from fedmentor_core.rounds.gate_sets import evaluate, evaluate_safety
from fedmentor_core.rounds.joining import aggregate
from fedmentor_core.rounds.noise import Comparisons, adapt, assignments_ahead
from fedmentor_core.rounds.state import RoundState, assignments_for, client_history, find_manifest, manifest_key

__all__ = [
    "Comparisons",
    "RoundState",
    "adapt",
    "aggregate",
    "assignments_ahead",
    "assignments_for",
    "client_history",
    "commit_round",
    "evaluate",
    "evaluate_safety",
    "find_manifest",
    "manifest_key",
    "now",
]
