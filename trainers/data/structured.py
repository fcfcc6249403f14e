"""What a chat template reads beside text: tool calls inside messages, the columns `tools` and `chat_template_kwargs`.

A table gives all records of a column the same keys and fills in nulls, which a template would write out. So these
values are kept as JSON, with the keys that they had. Where the source is a table of such records already, its own
nulls cannot be told from those that were filled in, and all of them are removed.
"""

import json
from typing import Any

from datasets import Json, List

TEMPLATE = ("tools", "chat_template_kwargs")  # columns
TEXT = ("role", "content")  # of a message; its other keys may hold records


def is_message(value: Any) -> bool:
    """Also of the type of a column."""
    return isinstance(value, dict) and value.keys() >= set(TEXT)


def blanked(value: Any, keys: set[str]) -> Any:
    """The value with "" for records in messages, whose types need not agree; their keys are added to `keys`."""
    if isinstance(value, list):
        return [blanked(item, keys) for item in value]
    if not isinstance(value, dict):
        return value
    found = {name for name, v in value.items() if isinstance(v, list | dict)} - set(TEXT) if is_message(value) else ()
    keys.update(found)
    return {name: "" if name in found else blanked(item, keys) for name, item in value.items()}


def with_json(feature: Any, keys: set[str]) -> Any:
    """The type of a column whose messages hold records under `keys`."""
    if isinstance(feature, List):
        return List(with_json(feature.feature, keys))
    if not isinstance(feature, dict):
        return feature
    own = keys if is_message(feature) else ()
    return {name: Json() if name in own else with_json(part, keys) for name, part in feature.items()}


def packed(row: dict[str, Any], columns: dict[str, Any]) -> dict[str, Any]:
    """The row with JSON text where `columns` say JSON; `datasets` itself would round numbers and read texts again."""
    return row | {name: _packed(row[name], columns[name]) for name in row if _holds_json(columns[name])}


def padded_columns(features: dict[str, Any] | None) -> dict[str, Any]:
    """The columns of a table that hold records whose nulls may have been filled in."""
    return {name: feature for name, feature in (features or {}).items() if _is_padded(feature, name in TEMPLATE)}


def without_padding(row: dict[str, Any], padded: dict[str, Any]) -> dict[str, Any]:
    """The row without those nulls; `padded` are the `padded_columns` of its table."""
    return row | {name: _without_null(row[name], padded[name], name in TEMPLATE) for name in padded if name in row}


def mixes_types(feature: Any, column: str) -> bool:
    """Whether a column holds JSON elsewhere than where records of any kind may lie."""
    if isinstance(feature, List):
        return mixes_types(feature.feature, column)
    if isinstance(feature, dict):
        return any(mixes_types(part, "") for key, part in feature.items() if not is_message(feature) or key in TEXT)
    return isinstance(feature, Json) and column not in TEMPLATE


def _packed(value: Any, feature: Any) -> Any:
    if value is None:
        return None
    if isinstance(feature, Json):
        return json.dumps(value, default=str)
    if isinstance(feature, List):
        return [_packed(item, feature.feature) for item in value]
    if isinstance(feature, dict):
        return {name: _packed(value.get(name), part) for name, part in feature.items()}
    return value


def _holds_json(feature: Any) -> bool:
    if isinstance(feature, dict):
        return any(map(_holds_json, feature.values()))
    return _holds_json(feature.feature) if isinstance(feature, List) else isinstance(feature, Json)


def _is_padded(feature: Any, inside: bool) -> bool:
    if isinstance(feature, List):
        return _is_padded(feature.feature, inside)
    if not isinstance(feature, dict):
        return False
    own = is_message(feature)
    return inside or any(_is_padded(part, own and name not in TEXT) for name, part in feature.items())


def _without_null(value: Any, feature: Any, inside: bool) -> Any:
    if isinstance(feature, List) and isinstance(value, list):
        return [_without_null(item, feature.feature, inside) for item in value]
    if not (isinstance(feature, dict) and isinstance(value, dict)):
        return value
    own = is_message(feature)
    return {
        name: _without_null(item, feature.get(name), inside or own and name not in TEXT)
        for name, item in value.items()
        if item is not None or not inside
    }
