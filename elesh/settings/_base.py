"""What every section of the settings has in common: frozen, strict about keys, no infinities."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

_S = TypeVar("_S", bound=BaseModel)
_RETIRED = "retired"


def retired(default: Any, reason: str, **limits: Any) -> Any:
    """A key that is not a setting any more: its default is the constant that is used.

    Files that give it load for one more version, and it still acts there, so that recorded
    decisions replay exactly; loading warns, and the reference does not list it.

    Args:
        reason: why it need not be set, or what to set instead.
    """
    return Field(default=default, json_schema_extra={_RETIRED: reason}, **limits)


def why_retired(field: FieldInfo) -> str:
    """Why a key is retired; empty where it is not."""
    extra = field.json_schema_extra
    return str(extra.get(_RETIRED, "")) if isinstance(extra, dict) else ""


def require_sum_one(section: _S, *names: str) -> _S:
    total = sum(getattr(section, name) for name in names)
    if abs(total - 1) > 1e-6:
        raise ValueError(f"{' + '.join(names)} must be 1, not {total:g}")
    return section


def no_boolean(section: type[BaseModel], value: Any, info: ValidationInfo) -> Any:
    """Refuse true and false where a number or a text is expected (pydantic takes them as 1, 0)."""
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
