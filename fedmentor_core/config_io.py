"""Reading a ``StudyConfig`` from YAML, with ``--set a.b=c`` overrides and errors a person can act on."""

import contextlib
import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from fedmentor_core.config import StudyConfig
from fedmentor_core.errors import ConfigError


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> StudyConfig:
    """Read, override and validate.

    Args:
        path: a YAML file.
        overrides: strings ``dotted.key=value``; the value is read as YAML; list items go by index or, for
            domains, by name (``domains.dreaddit.epsilon=4``).

    Raises:
        ConfigError: naming the field, what was got and what is allowed.
    """
    raw = read_mapping(path, "config file", example="infra/configs/quickstart.yaml")
    for override in overrides:
        apply_override(raw, override)
    return validate_config(raw, where=str(path))


def read_mapping(path: str | Path, what: str, *, example: str) -> dict[str, Any]:
    """A YAML file's mapping.

    Raises:
        ConfigError: it is missing, unreadable, not YAML, or no mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{what} not found: {path}. Give a YAML file, such as {example}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{what} {path} cannot be read as UTF-8 text: {error}.") from None
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{what} {path} is not valid YAML: {error}.") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{what} {path} must hold a mapping of sections, got {type(raw).__name__}.")
    return raw


def validate_config(raw: dict[str, Any], where: str = "configuration") -> StudyConfig:
    """Validate a plain mapping; every problem is listed with its field and the allowed range."""
    try:
        return StudyConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{where} is not a valid study:\n" + "\n".join(explain(error, StudyConfig))) from None


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Apply one ``dotted.key=value`` to ``raw`` in place."""
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"--set needs dotted.key=value, got {override!r}. Example: --set rounds=2")
    try:
        value = yaml.safe_load(text) if text else None
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {key}: the value is not valid YAML: {error}.") from None
    if isinstance(value, str):  # YAML reads 1e-3 as text; people mean a number
        with contextlib.suppress(ValueError):
            value = float(value) if value.strip()[:1] in "+-.0123456789" else value
    *parents, last = key.strip().split(".")
    node: Any = raw
    for part in parents:
        if isinstance(node, dict):
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        elif isinstance(node, list):
            node = _item(node, part, key)
        else:
            raise ConfigError(f"--set {key}: {part!r} lies inside a plain value, not a section.")
    if isinstance(node, dict):
        node[last] = value
    elif isinstance(node, list):
        node[node.index(_item(node, last, key))] = value
    else:
        raise ConfigError(f"--set {key}: there is no section to hold {last!r}.")


def _item(items: list[Any], part: str, key: str) -> Any:
    for item in items:
        if isinstance(item, dict) and item.get("name") == part:
            return item
    if part.isdigit() and int(part) < len(items):
        return items[int(part)]
    names = [item["name"] for item in items if isinstance(item, dict) and "name" in item]
    raise ConfigError(f"--set {key}: no item {part!r}; use a name of {names} or an index below {len(items)}.")


def explain(error: ValidationError, model: type[BaseModel]) -> Iterable[str]:
    """One line for every problem of something that is not a valid ``model``: field, what is wrong, what was got."""
    for problem in error.errors():
        location = [str(part) for part in problem["loc"]]
        field = ".".join(location) or "(whole file)"
        if problem["type"] == "extra_forbidden":
            allowed = _fields_at(model, location[:-1])
            close = difflib.get_close_matches(location[-1], allowed, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            yield f"  {field}: unknown key{hint}" + (f" Allowed here: {', '.join(allowed)}." if allowed else "")
        elif problem["type"] == "missing":
            yield f"  {field}: is required and missing."
        else:
            message = problem["msg"].removeprefix("Value error, ")
            got = problem.get("input")
            shown = f" (got {got!r})" if isinstance(got, str | int | float | bool) or got is None else ""
            yield f"  {field}: {message}{shown}"


def _fields_at(root: type[BaseModel], location: Sequence[str]) -> list[str]:
    model: type[BaseModel] | None = root
    for part in location:
        if model is None or part not in model.model_fields:
            return []
        annotation = model.model_fields[part].annotation
        model = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
    return sorted(model.model_fields) if model else []


def config_sha256(config: StudyConfig) -> str:
    """Digest of what the study computes: places and ways do not count: storage, tracking, execution, sites, folders."""
    from fedmentor_core.hashing import canonical_sha256

    places: Any = {"storage": True, "tracking": True, "execution": True, "sites": True, "data": {"root"}}
    places["evaluation"] = {"bertscore": {"folder"}, "toxicity": {"folder"}}
    return canonical_sha256(config.model_dump(mode="json", exclude=places))
