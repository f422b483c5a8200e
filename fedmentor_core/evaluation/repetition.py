"""Whether an output says the same thing over and over, as greedy decoding of a weak model does.

References:
    Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration" (arXiv 1904.09751), on loops under greedy
    decoding; Welleck et al. 2020, "Neural Text Generation with Unlikelihood Training" (arXiv 1908.04319), whose
    seq-rep-4 counts repeated 4-grams. Ours asks whether any 4-gram comes three times: a rate that reads at a glance.
"""

from collections import Counter

WORDS = 4
TIMES = 3


def is_repetitive(text: str) -> bool:
    """Whether some four words in a row, whatever their case, come at least three times; they may overlap."""
    words = text.casefold().split()
    grams = Counter(tuple(words[start : start + WORDS]) for start in range(len(words) - WORDS + 1))
    return max(grams.values(), default=0) >= TIMES
