"""Rules as plug-ins, found by name: the one way in which noise rules and aggregation rules are added.

The built-in rules of a package are its modules that define ``RULE``: dropping a file in adds a rule. Other packages add
theirs under the package's entry point group, where the entry's name is the rule's; an entry point is loaded only when
its rule is asked for.
"""

import difflib
import importlib
import pkgutil
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from fedmentor_core.errors import ConfigError

Rule = TypeVar("Rule")


@dataclass(frozen=True)
class RuleBook(Generic[Rule]):
    """All rules of one kind.

    Attributes:
        kind: for messages, such as ``noise rule``.
        package: whose modules are the built-in rules.
        group: entry point group of other packages' rules.
        protocol: a runtime-checkable protocol with a ``name``; what a rule must have.
    """

    kind: str
    package: str
    group: str
    protocol: Any

    def find(self, name: str) -> Rule:
        """The rule called ``name``.

        Raises:
            ConfigError: no rule has that name, or what is registered under it is not a rule.
        """
        if name in self._built_in:
            return self._built_in[name]
        entries = self._registered()
        if name not in entries:
            known = self.names()
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"there is no {self.kind} {name!r}.{hint} Known rules: {', '.join(known)}")
        try:
            rule: Any = entries[name].load()
        except Exception as error:  # whatever another package does when it is imported
            raise ConfigError(
                f"the {self.kind} {name!r} ({entries[name].value!r}) cannot be loaded: {type(error).__name__}: "
                f"{error}. Mend or uninstall the package that registers it"
            ) from error
        if not isinstance(rule, self.protocol) or rule.name != name:
            wanted = f"{self.protocol.__module__}.{self.protocol.__qualname__}"
            raise ConfigError(
                f"the entry point {name!r} of group {self.group!r} is {entries[name].value!r}, which is no "
                f"{self.kind} called {name!r}. It must name an object with what {wanted} asks for. Mend or uninstall "
                "the package that registers it"
            )
        return rule  # type: ignore[no-any-return]

    def names(self) -> list[str]:
        """Names of all rules, sorted."""
        return sorted({*self._built_in, *self._registered()})

    @cached_property
    def _built_in(self) -> dict[str, Rule]:
        folder = importlib.import_module(self.package).__path__
        modules = (importlib.import_module(f"{self.package}.{one.name}") for one in pkgutil.iter_modules(folder))
        return {module.RULE.name: module.RULE for module in modules if hasattr(module, "RULE")}

    def _registered(self) -> dict[str, EntryPoint]:
        return {entry.name: entry for entry in entry_points(group=self.group)}
