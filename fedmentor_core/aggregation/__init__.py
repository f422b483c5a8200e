"""Rules that join clients' updates, found by name.

A rule is a ``JoinRule`` (see ``base.py``). The built-in ones are the modules of this package that define ``RULE``:
dropping a file in adds a rule. Other packages add theirs under the entry point group ``fedmentor.join_rules``, where
the entry's name is the rule's. An entry point is loaded only when its rule is asked for.
"""

import difflib
import importlib
import pkgutil
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from fedmentor_core.aggregation.base import JoinRule
from fedmentor_core.errors import ConfigError

ENTRY_POINT_GROUP = "fedmentor.join_rules"


def find_rule(name: str) -> JoinRule:
    """The rule called ``name``.

    Raises:
        ConfigError: no rule has that name, or what is registered under it is not a rule.
    """
    built_in = _built_in()
    if name in built_in:
        return built_in[name]
    entries = _registered()
    if name not in entries:
        known = rule_names()
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"there is no aggregation rule {name!r}.{hint} Known rules: {', '.join(known)}")
    try:
        rule = entries[name].load()
    except Exception as error:  # whatever another package does when it is imported
        raise ConfigError(
            f"the aggregation rule {name!r} ({entries[name].value!r}) cannot be loaded: {type(error).__name__}: "
            f"{error}. Mend or uninstall the package that registers it"
        ) from error
    if not isinstance(rule, JoinRule) or rule.name != name:
        raise ConfigError(
            f"the entry point {name!r} of group {ENTRY_POINT_GROUP!r} is {entries[name].value!r}, which is not a rule "
            f"called {name!r}. It must name an object with what fedmentor_core.aggregation.base.JoinRule asks for. "
            "Mend or uninstall the package that registers it"
        )
    return rule


def rule_names() -> list[str]:
    """Names of all rules, sorted."""
    return sorted({*_built_in(), *_registered()})


@cache
def _built_in() -> dict[str, JoinRule]:
    modules = (importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__))
    return {module.RULE.name: module.RULE for module in modules if hasattr(module, "RULE")}


def _registered() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP)}
