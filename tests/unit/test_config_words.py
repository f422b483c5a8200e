"""What a configuration file may say must survive YAML: unquoted ``on`` and ``no`` are booleans there."""

from collections.abc import Iterator
from typing import Any

import yaml

from fedmentor_core.config import StudyConfig
from fedmentor_core.site.file import SiteFile


def words(schema: Any) -> Iterator[str]:
    """Every text that some field of a JSON schema allows."""
    if isinstance(schema, dict):
        for key, value in schema.items():
            if key == "enum":
                yield from (one for one in value if isinstance(one, str))
            elif key == "const" and isinstance(value, str):
                yield value
            else:
                yield from words(value)
    elif isinstance(schema, list):
        for one in schema:
            yield from words(one)


def test_every_word_that_a_field_allows_can_be_written_without_quotes():
    allowed = {*words(StudyConfig.model_json_schema()), *words(SiteFile.model_json_schema())}
    assert {"auto", "always", "never", "int6", "threads"} <= allowed, "the schema was read"
    assert [word for word in sorted(allowed) if yaml.safe_load(word) != word] == []
