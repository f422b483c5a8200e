"""The rule 'spend-down': a decreasing schedule, solved anew after every round, that low utility brings forward.

The paper's rule wastes epsilon in two ways; this one does not.

*A reserve that is never used bought nothing.* Here the planned schedule is that of 'decreasing' (see there why late
noise matters more), and what it keeps back for the late rounds is the reserve: spent in any case, in the last round
at the latest. Good utility leaves none of the budget unused.

*Budget that comes free is lost.* After every round the schedule is solved again, for what is really left over the
rounds that really remain. What a round that rested did not spend lowers the others' noise, and what a charged retry
cost is spread over all of them.

When utility has lagged for ``patience_rounds`` gates in a row, the next noise is gamma times what the schedule says,
but not below the least constant noise at which all remaining rounds fit. The late rounds pay: the noise stays there
until the schedule, solved with what is left, falls below it, if it still does.

Shown in ``tests/unit/test_noise_adaptation.py``: undisturbed it plays the plan of 'decreasing'; after rests it still
ends with at least 99 % of its share used, where 'decreasing' does not; when utility lags, its noise is at once below
that of a run with good utility; and in the model of ``decreasing.py``, at accountant's prices, the last adapter
carries less variance than under the paper's rule with good utility and an equal budget.
"""

from fedmentor_core.config import AdaptationConfig
from fedmentor_core.privacy.rules.base import Proposal, RunShare, Standing
from fedmentor_core.privacy.rules.decreasing import ratio


class SpendDown:
    """See the module."""

    name = "spend-down"
    watches_utility = True
    keeps_reserve = False

    def plan(self, settings: AdaptationConfig, share: RunShare, rdp: float, rounds: int) -> tuple[float, ...]:
        """What will be played when utility never lags and no round is retried or missed."""
        return share.geometric(rdp, rounds, ratio(settings, rounds))

    def propose(self, settings: AdaptationConfig, share: RunShare, standing: Standing) -> Proposal:
        """The schedule's next noise, times gamma when utility lags."""
        left = share.left(standing.spent_rdp)
        scheduled = share.geometric(left, standing.rounds_left, ratio(settings, len(standing.planned)))[0]
        seen = standing.utility_in_words(settings)
        if standing.lags(settings):
            wanted = settings.gamma * min(scheduled, standing.noise_multiplier)
            return Proposal(wanted, f"{seen}: noise times gamma, brought forward", answers_utility=True)
        return Proposal(scheduled, f"{seen}; schedule of what is left over {standing.rounds_left} round(s)")


RULE = SpendDown()
