"""The rule 'fixed': one noise multiplier for the whole run, which exhausts its share exactly.

The least noise at which all planned rounds fit, and no reserve. What every other rule is compared with.
"""

from fedmentor_core.config import AdaptationConfig
from fedmentor_core.privacy.rules.base import Proposal, RunShare, Standing


class Fixed:
    """See the module."""

    name = "fixed"
    watches_utility = False
    keeps_reserve = False

    def plan(self, settings: AdaptationConfig, share: RunShare, rdp: float, rounds: int) -> tuple[float, ...]:
        """The least constant noise."""
        return (share.least_noise(rdp, rounds),) * rounds

    def propose(self, settings: AdaptationConfig, share: RunShare, standing: Standing) -> Proposal:
        """No change, ever."""
        return Proposal(standing.noise_multiplier, "this rule never changes noise")


RULE = Fixed()
