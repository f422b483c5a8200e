"""What is owed is paid in order, once, and a silent service is asked rarely."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmentor_core.errors import ConfigError
from tasks.debts import PAUSE_SECONDS, Debts


class Service:
    """Takes what it is told, unless it is away; some things it refuses."""

    def __init__(self) -> None:
        self.away = False
        self.asked = 0
        self.took: list[str] = []
        self.refuses: set[str] = set()
        self.now = 0.0
        self.debts = Debts(clock=lambda: self.now)

    def take(self, what: str) -> None:
        self.asked += 1
        if self.away:
            raise ConnectionResetError("gone")
        if what in self.refuses:
            raise ConfigError("no.")
        self.took.append(what)

    def owe(self, what: str, *, at_once: bool = False) -> None:
        self.debts.owe(what, lambda: self.take(what), at_once=at_once)


@settings(deadline=None)  # MLflow is imported on the way
@given(st.lists(st.booleans(), max_size=30))
def test_everything_arrives_once_and_in_order(away):
    service = Service()
    for number, is_away in enumerate(away):
        service.away = is_away
        service.owe(str(number))
        service.now += PAUSE_SECONDS / 2
    service.away = False
    assert service.debts.settle(at_once=True)
    assert service.took == [str(number) for number in range(len(away))]


def test_one_question_a_minute_and_none_is_saved_up_once_it_answers():
    service = Service()
    service.away = True
    for number in range(5):
        service.owe(str(number))
    assert service.asked == 1
    service.away = False
    service.owe("now", at_once=True)
    service.owe("next")
    assert service.took[-2:] == ["now", "next"]


def test_a_refusal_is_kept_and_holds_nothing_up():
    service = Service()
    service.refuses = {"b"}
    for name in "abc":
        service.owe(name)
    assert (service.took, service.debts.owed) == (["a", "c"], ("b",))
    assert service.debts.problem == "b: ConfigError: no"


def test_nothing_is_paid_before_what_it_rests_on():
    service = Service()
    service.away = True
    service.debts.begin("the run", lambda: service.take("the run"), wait=True)
    service.owe("a round")
    service.away, service.refuses = False, {"the run"}
    assert not service.debts.settle(at_once=True)
    assert service.took == []
    assert service.debts.owed == ("the run", "a round")


def test_a_beginning_that_is_refused_or_may_not_wait_raises():
    service = Service()
    service.refuses = {"the run"}
    with pytest.raises(ConfigError):
        service.debts.begin("the run", lambda: service.take("the run"), wait=True)
    service.away = True
    with pytest.raises(ConnectionResetError):
        service.debts.begin("the run", lambda: service.take("the run"), wait=False)
    assert service.debts.owed == ()
