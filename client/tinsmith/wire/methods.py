"""What a single-tenant run may train instead of LoRA, and the settings of each method.

full       all of the base's own weights
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tinsmith.errors import InvalidInput


@dataclass(frozen=True)
class Setting:
    """A number of a method: what it is unless it is given, and between what it must be. A whole number if its
    default is one."""

    default: float
    least: float
    most: float


METHODS: dict[str, dict[str, Setting]] = {
    "full": {},
}


def settings_of(method: str, given: Mapping[str, Any]) -> dict[str, float]:
    """All settings of the method, those that are not given at their defaults. InvalidInput for a method or a
    setting that there is not, and for a number out of its bounds."""
    if method not in METHODS:
        raise InvalidInput(f"there is no method {method!r}: take one of {', '.join(sorted(METHODS))}")
    known = METHODS[method]
    if odd := sorted(set(given) - set(known)):
        has = ", ".join(known) or "none"
        raise InvalidInput(f"method {method!r} has no setting {odd[0]!r}: it has {has}")
    return {name: _number(method, name, setting, given.get(name)) for name, setting in known.items()}


def _number(method: str, name: str, setting: Setting, given: Any) -> float:
    value = setting.default if given is None else given
    kinds = (int,) if isinstance(setting.default, int) else (int, float)
    if type(value) not in kinds or not setting.least <= value <= setting.most:
        what = "a whole number" if kinds == (int,) else "a number"
        raise InvalidInput(
            f"{name} of method {method!r} is {value!r}: it must be {what} from {setting.least:g} to "
            f"{setting.most:g}"
        )
    return float(value) if isinstance(setting.default, float) else int(value)
