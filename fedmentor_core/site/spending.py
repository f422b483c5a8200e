"""What an account may have lost, as the server can know it: the site's own ledger is not its to read.

The site says after each round what is spent for life. Of a round that it did not answer nobody here knows whether its
attempts were charged, so all of them are counted: never less than the truth, and never more than the run's share, which
the site's own filter enforces.
"""

from collections.abc import Iterable, Sequence

from fedmentor_core.privacy.accountant import conversion_cost
from fedmentor_core.privacy.filter import PrivacyAccount
from fedmentor_core.privacy.mechanism import charged_events
from fedmentor_core.records import ClientSummary, ClientUpdate, DomainPlan
from fedmentor_core.workspace import Workspace


def most_spent_rdp(workspace: Workspace, plan: DomainPlan, history: Iterable[ClientUpdate | ClientSummary]) -> float:
    """Upper bound on the RDP, at the account's order, that the domain's account has spent.

    Args:
        workspace: the server's.
        plan: the domain's.
        history: the domain's record of every round of this run so far, in order.
    """
    account = PrivacyAccount.of(plan)
    if account is None:
        return plan.spent_rdp_before
    attempts = workspace.config.execution.client_retries + 1
    spent = plan.spent_rdp_before
    for client in history:
        if client.status in ("trained", "rested"):
            if client.epsilon_spent:
                spent = max(0.0, client.epsilon_spent - conversion_cost(account.rdp_order, account.delta))
        elif client.noise_multiplier is not None:
            events = charged_events(plan.privacy_level, client.sample_rate, client.steps)
            spent += attempts * account.charge_of(client.noise_multiplier, events.sample_rate, events.steps)
            spent = min(spent, account.rdp_budget if plan.run_rdp_budget is None else plan.run_rdp_budget)
    return spent


def most_spent_epsilon(
    workspace: Workspace, plan: DomainPlan, history: Sequence[ClientUpdate | ClientSummary]
) -> float | None:
    """The same as epsilon; None where nothing is accounted."""
    account = PrivacyAccount.of(plan)
    return None if account is None else account.epsilon_spent(most_spent_rdp(workspace, plan, history))
