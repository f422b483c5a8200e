"""The rule 'paper': low utility lowers the noise by a factor, paid from a reserve that was planned at the start.

FedMentor (arXiv 2509.14275): the server lowers a domain's noise when its utility falls below a threshold. The paper
does not say who pays for it. Here the plan spends all but ``privacy.reserve_fraction`` of the run's share, and after
``patience_rounds`` gates in a row below the threshold the noise becomes

    max(gamma * noise, the site's floor, least noise at which all remaining rounds fit).

Where utility is good the reserve is never touched: the domain ends with more privacy than it was promised. The price
is more noise in every round than 'fixed' has.
"""

from fedmentor_core.config import AdaptationConfig
from fedmentor_core.privacy.rules.base import Proposal, RunShare, Standing


class Paper:
    """See the module."""

    name = "paper"
    watches_utility = True
    keeps_reserve = True

    def plan(self, settings: AdaptationConfig, share: RunShare, rdp: float, rounds: int) -> tuple[float, ...]:
        """The least constant noise that leaves the reserve."""
        return (share.least_noise(rdp, rounds),) * rounds

    def propose(self, settings: AdaptationConfig, share: RunShare, standing: Standing) -> Proposal:
        """Gamma times the noise, once utility has lagged for long enough."""
        seen = standing.utility_in_words(settings)
        if not standing.lags(settings):
            patience = f", fewer than {settings.patience_rounds}" if standing.rounds_below else ""
            return Proposal(standing.noise_multiplier, seen + patience)
        return Proposal(settings.gamma * standing.noise_multiplier, f"{seen}: noise times gamma", answers_utility=True)


RULE = Paper()
