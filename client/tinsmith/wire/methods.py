"""What a single-tenant run may train instead of LoRA, and the settings of each method.

full       all of the base's own weights
dora       LoRA with a trained magnitude of every output beside it (Liu et al. 2024)
oft        a rotation of every map's inputs, in blocks (Qiu et al. 2023)
hra        a rotation of every map's inputs, as a chain of reflections (Yuan et al. 2024)
vera       scales of random matrices that all maps share (Kopiczko et al. 2024)
loha       a Hadamard product of two products of low rank (Hyeon-Woo et al. 2022)
lokr       a Kronecker product (Yeh et al. 2024)
ia3        scales of keys, values and of what the MLP keeps (Liu et al. 2022)
ln_tuning  the weights of the norms (Zhao et al. 2024)

All but the first are the PEFT library's; what is not a setting here has its default there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tinsmith.errors import InvalidInput


@dataclass(frozen=True)
class Setting:
    """A whole number of a method: what it is unless it is given, and between what it must be."""

    default: int
    least: int = 1
    most: int = 1 << 16


METHODS: dict[str, dict[str, Setting]] = {
    "full": {},
    "dora": {"rank": Setting(32, most=1024), "alpha": Setting(32)},
    "oft": {"block_size": Setting(32, least=2, most=1024)},
    "hra": {"rank": Setting(8, most=1024)},
    "vera": {"rank": Setting(256)},
    "loha": {"rank": Setting(8, most=1024), "alpha": Setting(8)},
    "lokr": {"rank": Setting(8, most=1024), "alpha": Setting(8)},
    "ia3": {},
    "ln_tuning": {},
}
"""By name the settings of each method."""


def settings_of(method: str, given: Mapping[str, Any]) -> dict[str, int]:
    """All settings of the method, those that are not given at their defaults. InvalidInput for a method or a
    setting that there is not, and for a number out of its bounds."""
    if method not in METHODS:
        raise InvalidInput(f"there is no method {method!r}: take one of {', '.join(METHODS)}")
    known = METHODS[method]
    if odd := sorted(set(given) - set(known)):
        has = ", ".join(known) or "none"
        raise InvalidInput(f"method {method!r} has no setting {odd[0]!r}: it has {has}")
    for name, value in given.items():
        setting = known[name]
        if type(value) is not int or not setting.least <= value <= setting.most:
            raise InvalidInput(
                f"{name} of method {method!r} is {value!r}: it must be a whole number from {setting.least} "
                f"to {setting.most}"
            )
    return {name: given.get(name, setting.default) for name, setting in known.items()}
