"""Rules that join clients' updates: one module of this package each, or an entry point (``plugins.py``)."""

from fedmentor_core.aggregation.base import JoinRule
from fedmentor_core.plugins import RuleBook

ENTRY_POINT_GROUP = "fedmentor.join_rules"
_RULES: RuleBook[JoinRule] = RuleBook("aggregation rule", __name__, ENTRY_POINT_GROUP, JoinRule)

find_rule = _RULES.find
rule_names = _RULES.names
