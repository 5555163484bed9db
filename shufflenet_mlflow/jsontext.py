"""Plain values as JSON that every reader takes."""

import json
import math
from typing import Any


def to_json(value: Any) -> str:
    """Indented JSON; numbers that are not finite, which JSON does not know, become null."""
    return json.dumps(_finite(value), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
