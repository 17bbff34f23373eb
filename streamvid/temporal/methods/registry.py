"""Finds methods: the folder is the registry, file name = id; other packages join by entry point."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import pkgutil
from importlib.metadata import entry_points

from streamvid import errors
from streamvid.budget import Budget
from streamvid.temporal.methods.base import Method, Stage

GROUP = "streamvid.methods"
"""Entry points of this group name method classes of other packages; the entry's name is the id."""


@functools.cache
def methods() -> dict[str, type[Method]]:
    """All methods by id, in the order of stages and then of names."""
    found: dict[str, type[Method]] = {}
    for stage in Stage:
        package = importlib.import_module(f"streamvid.temporal.methods.{stage.value}")
        for module in sorted(m.name for m in pkgutil.iter_modules(package.__path__)):
            found[module] = _class_in(f"{package.__name__}.{module}")
    for entry in entry_points(group=GROUP):
        found[entry.name] = entry.load()
    return found


def _class_in(module: str) -> type[Method]:
    loaded = importlib.import_module(module)
    own = [
        value
        for value in vars(loaded).values()
        if inspect.isclass(value) and issubclass(value, Method) and value.__module__ == module
    ]
    if len(own) != 1:
        raise TypeError(f"{module} must define exactly one method class, found {[c.__name__ for c in own]}")
    return own[0]


def method_id(method: Method | type[Method]) -> str:
    """The id a method is registered under."""
    wanted = method if inspect.isclass(method) else type(method)
    for name, cls in methods().items():
        if cls is wanted:
            return name
    return wanted.__name__


def build(text: str) -> Method:
    """A method from its id and settings, as ``fastvid`` or ``fastvid:keep_ratio=0.25,dtm_beta=0.5``.

    Settings are the dataclass fields; a ``budget`` field is set by ``keep_ratio`` or ``tokens``.

    Raises:
        SettingsError: for an unknown id or setting (with near matches) or a bad value.
    """
    name, _, rest = text.partition(":")
    known = methods()
    if name not in known:
        raise errors.SettingsError(f"there is no method {name!r}; {errors.near(name, known)}")
    cls = known[name]
    kinds = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    given: dict[str, object] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise errors.SettingsError(f"settings of {name} are written key=value, got {part!r}")
        if "budget" in kinds and key in ("keep_ratio", "tokens"):
            number = _number(name, key, value)
            given["budget"] = Budget(keep_ratio=number) if key == "keep_ratio" else Budget(tokens=int(number))
        elif key in kinds and key != "budget":
            given[key] = _parse(name, key, value, kinds[key])
        else:
            names = [*(k for k in kinds if k != "budget"), *(("keep_ratio", "tokens") if "budget" in kinds else ())]
            raise errors.SettingsError(f"{name} has no setting {key!r}; {errors.near(key, names)}")
    try:
        method = cls(**given)
    except (TypeError, ValueError) as error:
        raise errors.SettingsError(f"{name}: {error}") from error
    method.reset()
    return method


def _number(name: str, key: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise errors.SettingsError(f"{key} of {name} must be a number, got {value!r}") from None


def _parse(name: str, key: str, value: str, field: dataclasses.Field[object]) -> object:
    kind = str(field.type)
    if "bool" in kind:
        if value.lower() not in ("true", "false"):
            raise errors.SettingsError(f"{key} of {name} must be true or false, got {value!r}")
        return value.lower() == "true"
    if "float" in kind:
        return _number(name, key, value)
    if "int" in kind:
        number = _number(name, key, value)
        if number != int(number):
            raise errors.SettingsError(f"{key} of {name} must be a whole number, got {value!r}")
        return int(number)
    return value
