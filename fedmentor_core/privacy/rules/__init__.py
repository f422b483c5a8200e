"""Rules that set each round's noise: one module of this package each, or an entry point (``plugins.py``)."""

from fedmentor_core.plugins import RuleBook
from fedmentor_core.privacy.rules.base import NoiseRule

ENTRY_POINT_GROUP = "fedmentor.noise_rules"
_RULES: RuleBook[NoiseRule] = RuleBook("noise rule", __name__, ENTRY_POINT_GROUP, NoiseRule)

find_rule = _RULES.find
rule_names = _RULES.names
