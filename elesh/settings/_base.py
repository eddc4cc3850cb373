"""What every section of the settings has in common: frozen, strict about keys, no infinities."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

_S = TypeVar("_S", bound=BaseModel)


def require_sum_one(section: _S, *names: str) -> _S:
    total = sum(getattr(section, name) for name in names)
    if abs(total - 1) > 1e-6:
        raise ValueError(f"{' + '.join(names)} must be 1, not {total:g}")
    return section


def no_boolean(section: type[BaseModel], value: Any, info: ValidationInfo) -> Any:
    """Refuse true and false where a number or a text is asked for (pydantic takes them as 1, 0)."""
    field = section.model_fields[info.field_name or ""]
    if isinstance(value, bool) and field.annotation is not bool:
        raise ValueError("a number or a text is expected here, not true or false")
    return value


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )
    _types = field_validator("*", mode="before")(classmethod(no_boolean))
