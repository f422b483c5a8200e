"""What a service has not taken yet: kept in order, and tried again until it has."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tasks.mlflow_connection import first_line, no_answer

PAUSE_SECONDS = 60.0


@dataclass(frozen=True)
class Debt:
    """Something that is owed; ``needed``: nothing after it can be paid before it."""

    what: str
    pay: Callable[[], None]
    needed: bool = False


@dataclass
class Debts:
    """A queue of things to do that may be done twice, against a service that may be gone. Thread-safe.

    One unanswered request ends an attempt, and for ``PAUSE_SECONDS`` nobody asks again: that bounds what a lost server
    costs whoever owes (``mlflow_connection.PATIENCE`` bounds one request). What is refused is passed over and kept.

    Attributes:
        clock: seconds that only grow.
        problem: what went wrong last.
    """

    clock: Callable[[], float] = time.monotonic
    problem: str = ""
    _waiting: list[Debt] = field(default_factory=list)
    _silent_until: float = float("-inf")
    _lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def owed(self) -> tuple[str, ...]:
        """What is still to be paid, in order."""
        return tuple(debt.what for debt in self._waiting)

    def owe(self, what: str, pay: Callable[[], None], *, at_once: bool = False) -> None:
        """Pay now if everything before it is paid, else later. Never raises for ``pay``."""
        with self._lock:
            self._waiting.append(Debt(what, pay))
            self.settle(at_once=at_once)

    def begin(self, what: str, pay: Callable[[], None], *, wait: bool) -> None:
        """Pay what everything later rests on, or owe it where the service does not answer.

        Args:
            what: its name.
            pay: how.
            wait: whether no answer may be waited for.

        Raises:
            Exception: whatever ``pay`` raised, where that is not to be waited for.
        """
        with self._lock:
            if not self._waiting:
                try:
                    return pay()
                except Exception as error:
                    if not wait or not no_answer(error):
                        raise
                    self._note(what, error)
            self._waiting.append(Debt(what, pay, needed=True))

    def settle(self, *, at_once: bool = False) -> bool:
        """Pay in order, up to where the service does not answer.

        Args:
            at_once: ask even where it did not answer a moment ago.

        Returns:
            Whether nothing is owed any more.
        """
        with self._lock:
            if self._waiting and (at_once or self.clock() >= self._silent_until):
                self._pay()
            return not self._waiting

    def _pay(self) -> None:
        unpaid: list[Debt] = []
        rest = list(self._waiting)
        while rest:
            debt = rest.pop(0)
            try:
                debt.pay()
            except Exception as error:
                self._note(debt.what, error)
                unpaid.append(debt)
                if debt.needed or no_answer(error):
                    break
            else:
                self._silent_until = float("-inf")  # it answers again
        self._waiting = unpaid + rest

    def _note(self, what: str, error: Exception) -> None:
        self.problem = f"{what}: {first_line(error)}"
        if no_answer(error):
            self._silent_until = self.clock() + PAUSE_SECONDS
