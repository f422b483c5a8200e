r"""The rule 'decreasing': a geometric schedule planned at the start that exhausts the run's share and sees no metric.

Why noise should fall. Near a minimum, a step of size h on curvature c multiplies what earlier noise did to the
weights by (1 - h c), so by the end the noise of round t has been contracted by all rounds after it. If a round
contracts variance by a, and a round at noise sigma is priced about sigma^-p, the last adapter carries

    sum_t a^(R - 1 - t) * sigma_t^2   of variance, for a price of   sum_t sigma_t^-p.

Setting the Lagrangian's derivative to zero gives sigma_t^(p + 2) proportional to a^-(R - 1 - t): a geometric
schedule, whose last noise is (a^(R - 1))^(1 / (p + 2)) of its first. Hong, Wang and Zhou (arXiv 2101.07413) show for
noised gradient descent under the Polyak-Lojasiewicz condition that such a decreasing schedule improves the bound on
the final loss, and find by experiment that exponential decay also helps on losses without it.

How steep. For a Gaussian without sampling p is 2. Sampling makes low noise much dearer: at sample rate 0.03 and
epsilon 4, p is above 8. So ``final_noise_fraction`` should stay near 1. For a run that contracts its first round's
noise to a quarter, 0.9 leaves about one percent less variance than 'fixed'; 0.7, which would be right without
sampling, leaves eight percent more. With no contraction 'fixed' is best. All this is the model above played with the
accountant's own prices (``tests/unit/test_noise_adaptation.py``), not a promise about Adam on a loss that is not
convex.
"""

from fedmentor_core.config import AdaptationConfig
from fedmentor_core.privacy.rules.base import Proposal, RunShare, Standing


class Decreasing:
    """See the module."""

    name = "decreasing"
    watches_utility = False
    keeps_reserve = False

    def plan(self, settings: AdaptationConfig, share: RunShare, rdp: float, rounds: int) -> tuple[float, ...]:
        """The least geometric schedule whose last noise is ``final_noise_fraction`` of its first."""
        return share.geometric(rdp, rounds, ratio(settings, rounds))

    def propose(self, settings: AdaptationConfig, share: RunShare, standing: Standing) -> Proposal:
        """The planned noise; where retries have used up what it needs, the same fall from a higher start."""
        remaining = standing.planned[-standing.rounds_left :]
        left = share.left(standing.spent_rdp)
        if share.cost(remaining) <= left:
            return Proposal(remaining[0], "as planned at the start")
        again = share.geometric(left, standing.rounds_left, ratio(settings, len(standing.planned)))
        return Proposal(again[0], "planned anew, since charged retries used budget of the plan")


def ratio(settings: AdaptationConfig, rounds: int) -> float:
    """One round's noise over the one before, such that a run of so many rounds ends at ``final_noise_fraction``."""
    return 1.0 if rounds == 1 else float(settings.final_noise_fraction ** (1 / (rounds - 1)))


RULE = Decreasing()
