"""The base of every configuration model: units, contradictions, and pydantic's errors as one line for a person."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from engine.config import fields
from engine.config.scalars import parse_scalar
from engine.errors import UserError

Locate = Callable[[fields.Loc], str | None]
Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class Problem:
    """A contradiction: the field to name (dotted, relative to the section), what is wrong, and the way out."""

    field: str
    text: str
    fix: str


def option(default: Any, description: str, unit: str | None = None, **constraints: Any) -> Any:
    """A pydantic field with a description and a unit; constraints are pydantic's (``ge``, ``gt``, ``le``, ``lt``)."""
    extra: dict[str, Any] | None = {"unit": unit} if unit else None
    if callable(default):
        return Field(default_factory=default, description=description, json_schema_extra=extra, **constraints)
    return Field(default=default, description=description, json_schema_extra=extra, **constraints)


class _UserErrors(type(BaseModel)):
    """``Section(...)`` raises UserError. Only for the outermost: pydantic does not call nested classes."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().__call__(*args, **kwargs)
        except ValidationError as error:
            raise user_error(cls, error) from None  # type: ignore[arg-type]


class Section(BaseModel, metaclass=_UserErrors):
    """A part of the configuration: frozen, unknown fields forbidden, contradictions refused with the way out."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True, protected_namespaces=()
    )

    def _resolve(self) -> Iterable[tuple[str, Any]]:
        """Values for fields left at None that follow from other fields."""
        return ()

    def problems(self) -> Iterator[Problem]:
        """Contradictions between the fields of this section."""
        yield from ()

    @field_validator("*", mode="before")
    @classmethod
    def _plain_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """Read '3e-4' as a number, and refuse true where a number is meant: pydantic would take it for 1."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        kinds = fields.options(annotation)
        if int not in kinds and float not in kinds:
            return value
        if isinstance(value, str) and not fields.takes_text(annotation):
            value = parse_scalar(value)
        if isinstance(value, bool) and bool not in kinds:
            raise PydanticCustomError("not_a_number", "not a number")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name, value in self._resolve():
            object.__setattr__(self, name, value)  # frozen for users; not counted as set, so it follows later changes
        problems = list(self.problems())
        if problems:
            raise PydanticCustomError("contradiction", "contradiction", {"problems": problems})
        return self

    @classmethod
    def model_validate(cls, obj: Any, **kwargs: Any) -> Self:
        try:
            return super().model_validate(obj, **kwargs)
        except ValidationError as error:
            raise user_error(cls, error) from None

    def with_values(self, changes: dict[str, Any]) -> Self:
        """A checked copy with fields changed by dotted path: ``cfg.with_values({"train.max_steps": 3})``."""
        data = self.model_dump(exclude_unset=True)
        for path, value in changes.items():
            set_path(data, path.split("."), value)
        return type(self).model_validate(data)


def set_path(data: dict[str, Any], parts: list[str], value: Any) -> None:
    """Set a nested value, making the mappings on the way; anything that is not a mapping there is replaced."""
    for part in parts[:-1]:
        if not isinstance(data.get(part), dict):
            data[part] = {}
        data = data[part]
    data[parts[-1]] = value


def build(model: type[Model], data: Any, locate: Locate | None = None) -> Model:
    """Validate ``data``; ``locate`` turns a path into the file and line, or the flag, that it came from.

    Raises:
        UserError: one line that names the field, its source, and the way out.
    """
    try:
        return model.__pydantic_validator__.validate_python(data)  # type: ignore[return-value]
    except ValidationError as error:
        raise user_error(model, error, locate) from None


def user_error(model: type[BaseModel], error: ValidationError, locate: Locate | None = None) -> UserError:
    """The first of pydantic's errors as one line, and how many more there are."""
    found = [message for detail in error.errors(include_url=False) for message in _messages(model, detail)]
    # A misspelt name explains the value missing beside it, so it goes first.
    found.sort(key=lambda message: not message[3])
    loc, problem, fix, _ = found[0]
    name = ".".join(printable(part) for part in loc) or model.__name__
    source = locate(loc) if locate else None
    where = f"{source}: {name}" if source and source.lstrip("-") != name else source or name
    if len(found) > 1:
        fix = f"{fix} (and {len(found) - 1} more)".lstrip()
    return UserError(problem, where=where, fix=fix)


def _messages(model: type[BaseModel], detail: Any) -> Iterator[tuple[fields.Loc, str, str, bool]]:
    """(location, problem, fix, is it an unknown name) for one of pydantic's errors."""
    loc: fields.Loc = detail["loc"]
    if detail["type"] == "contradiction":
        for problem in detail["ctx"]["problems"]:
            yield (*loc, *problem.field.split(".")), problem.text, problem.fix, False
        return
    if detail["type"] == "extra_forbidden":
        meant = fields.suggest(model, loc)
        parent, _ = fields.find(model, loc[:-1])
        section = fields.submodel(parent)
        names = ", ".join(section.model_fields) if section else "none"
        fix = f"Did you mean {meant}?" if meant else f"The fields here are {names}"
        yield loc, "unknown field", fix, True
        return
    if detail["type"] == "value_error" or detail["type"] == "assertion_error":
        yield loc, str(detail["ctx"]["error"]), "", False
        return
    annotation, info = fields.find(model, loc)
    wanted = fields.expected(annotation, info)
    if detail["type"] == "missing":
        yield loc, f"is required: {wanted}", "", False
        return
    value = detail["input"]
    named = [str(choice) for choice in fields.choices(annotation)]
    close = get_close_matches(value.lower(), named, n=1) if isinstance(value, str) else []
    yield loc, f"got {brief(value)}, expected {wanted}", f"Did you mean {close[0]}?" if close else "", False


def printable(part: Any) -> str:
    text = str(part)
    return brief(text, 80) if not text.isprintable() or len(text) > 80 else text


def brief(value: Any, limit: int = 60) -> str:
    """A value as it may stand in an error line: quoted if text, escaped, shortened."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int) and abs(value) >= 10**limit:
        return "a number of more than 60 digits"  # str() of a huge int is slow, and past 4,300 digits an error
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
