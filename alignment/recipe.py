"""Recipes: how a model is made, as a TOML file that is read into a frozen dataclass and written back from it.

A recipe's class is its own schema: what it does not name is an error, what it leaves out has the class's default, and
its `__post_init__` checks ranges. A table that is written in part keeps the rest of the default that stands in its
place. `"none"` stands for None wherever that is allowed, for TOML has no word for it: `lora=none` trains all weights.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
import tomllib
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from guardrails import lines

T = TypeVar("T")
NONE = "none"
"""How None is written."""

_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false", Path: "a path"}
_MISSING = dataclasses.MISSING
_BARE = re.compile(r"[A-Za-z0-9_-]+")


class RecipeError(ValueError):
    """A recipe that cannot be used; `problems` has every reason with its place, one a line in the message."""

    def __init__(self, problems: Sequence[str]):
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


def load(kind: type[T], path: Path | None, overrides: Sequence[str] = ()) -> T:
    """The recipe in a TOML file with the overrides on top of it; all defaults where there is no file.

    overrides: `key=value`, `table.key=value`, `list.0.key=value`; values are TOML, bare words are text. Paths in the
    file are relative to its folder, those of overrides to the current one; all are absolute afterwards. Raises
    RecipeError.
    """
    reader = _Reader()
    tree = _parsed(path, reader) if path else {}
    for one in overrides:
        _override(tree, one, reader)
    if reader.problems:
        raise RecipeError(reader.problems)
    made = reader.table(kind, tree, (), _MISSING)
    if reader.problems:
        raise RecipeError(reader.problems)
    recipe: T = made
    return recipe


def dump(recipe: object) -> str:
    """The whole recipe as TOML, defaults written out, paths absolute; `load` makes an equal recipe of it.

    Raises RecipeError for what TOML cannot say.
    """
    return "\n".join(_written(recipe, (), _MISSING)).strip("\n") + "\n"


# --- reading


def _parsed(path: Path, reader: _Reader) -> dict[str, Any]:
    """The file as tables, its lines in `reader`; raises RecipeError when it is no TOML or cannot be read."""
    try:
        source = path.read_text(encoding="utf-8")
        tree = tomllib.loads(source)
    except OSError as error:
        near = _near(path.name, [one.name for one in path.parent.glob("*.toml")])
        raise RecipeError([f"{path}: cannot be read ({error.strerror}){near or '; name a recipe'}"]) from None
    except UnicodeDecodeError:
        raise RecipeError([f"{path}: is not UTF-8; save it as UTF-8"]) from None
    except (ValueError, RecursionError) as error:
        place = re.search(r"(.*) \(at line (\d+), column (\d+)\)$", str(error))
        where, what = (place[2], f"{place[1]} at column {place[3]}") if place else ("1", str(error))
        raise RecipeError([f"{path}:{where}: not valid TOML: {what}; correct this line"]) from None
    reader.file, reader.folder, reader.places = str(path), path.parent, lines.lines(source)
    return tree


def _override(tree: dict[str, Any], text: str, reader: _Reader) -> None:
    """Puts an override into the tree, making the tables around it; notes a problem when it is none."""
    name, equals, value = text.partition("=")
    parts = name.strip().split(".")
    if not equals or not all(parts):
        reader.problems.append(f"override {text!r}: is not key=value; write a key, `=`, and a value of TOML")
        return
    try:
        path, holder = _holder(tree, parts)
        holder[path[-1]] = _value(value.strip())
    except ValueError as error:
        reader.problems.append(f"override {text!r}: {error}")
        return
    reader.overrides = {known: one for known, one in reader.overrides.items() if known[: len(path)] != path}
    reader.overrides[path] = text


def _holder(tree: dict[str, Any], parts: Sequence[str]) -> tuple[lines.Path, Any]:
    """(the path, the table or list that the path's last part is in)."""
    holder: Any = tree
    path: lines.Path = ()
    key: Any
    for part, after in zip(parts, [*parts[1:], ""], strict=True):
        key = part
        if isinstance(holder, list):
            if not part.isdecimal() or int(part) >= len(holder):
                raise ValueError(f"the list has {len(holder)} items; write a number under {len(holder)}, not {part!r}")
            key = int(part)
        path = (*path, key)
        if after:
            inner = holder[key] if isinstance(holder, list) else holder.get(part)
            if not isinstance(inner, (dict, list)):
                inner = holder[key] = {}
            holder = inner
    return path, holder


def _value(text: str) -> Any:
    """A value of TOML; what is none, and does not begin as a list, a table or a quoted text, is text itself."""
    try:
        found = tomllib.loads(f"x = {text}")
    except tomllib.TOMLDecodeError as error:
        if text[:1] in ("[", "{", '"', "'"):
            raise ValueError(f"the value is not valid TOML: {error}; texts in lists have quotes") from None
        return text
    return found["x"] if len(found) == 1 else text


class _Wrong(Exception):
    """A value that is not of the wanted type."""


@dataclass(slots=True)
class _Reader:
    """Makes dataclasses of tables, noting every problem where it was written."""

    file: str = ""
    folder: Path = field(default_factory=Path)
    places: Mapping[lines.Path, int] = field(default_factory=dict)
    overrides: dict[lines.Path, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def override(self, path: lines.Path) -> str | None:
        """The override that wrote the value at `path`, if one did."""
        found = [path[:n] for n in range(len(path), 0, -1) if path[:n] in self.overrides]
        return self.overrides[found[0]] if found else None

    def wrong(self, path: lines.Path, what: str) -> None:
        """Notes a problem at the place of `path`."""
        written = self.override(path)
        file = f"{self.file}:{lines.nearest(dict(self.places), path)}" if self.file else "the recipe"
        self.problems.append(f"{f'override {written!r}' if written else file}: {what}")

    def table(self, kind: type[Any], raw: Mapping[str, Any], path: lines.Path, default: object) -> Any:
        """A `kind` of a table, or None with its problems noted; `default` has what the table leaves out."""
        known = _types(kind)
        defaults = _defaults(kind, default)
        for key in raw:
            if key not in known:
                self.wrong((*path, key), f"unknown key {_dotted((*path, key))!r}{_offer(key, kind, path)}")
        before = len(self.problems)
        given = {
            name: self.read(wanted, raw[name], (*path, name), defaults[name])
            for name, wanted in known.items()
            if name in raw
        }
        for name in known:
            if name not in raw and defaults[name] is _MISSING:
                wanted = f"add {_dotted((*path, name))} = ... ({_wanted(known[name])})"
                self.wrong(path, f"there is no {_dotted((*path, name))!r}; {wanted}")
        if len(self.problems) > before:
            return None
        try:
            return kind(**{name: value for name, value in defaults.items() if value is not _MISSING} | given)
        except ValueError as error:
            named = [word for word in re.findall(r"\w+", str(error)) if word in raw]
            self.wrong((*path, *named[:1]), f"{_dotted(path)}: {error}" if path else str(error))
            return None

    def read(self, wanted: Any, raw: object, path: lines.Path, default: object = _MISSING) -> Any:
        """`raw` as the wanted type, or None with its problems noted."""
        try:
            return self.made(wanted, raw, path, default)
        except _Wrong:
            self.wrong(path, f"{_dotted(path)} = {_shown(raw)} is not {_wanted(wanted)}")
            return None

    def made(self, wanted: Any, raw: object, path: lines.Path, default: object) -> Any:
        """`raw` as the wanted type; raises _Wrong where it is another, and notes what is wrong further inside."""
        if _is_union(wanted):
            return self.one_of(wanted, raw, path, default)
        origin = get_origin(wanted)
        if dataclasses.is_dataclass(wanted) and isinstance(raw, dict):
            return self.table(wanted, raw, path, default)  # type: ignore[arg-type]
        if origin in (tuple, list, Sequence) and isinstance(raw, list):
            return self.items(wanted, raw, path)
        if origin in (dict, Mapping) and isinstance(raw, dict):
            inner = get_args(wanted)[1]
            return {key: self.read(inner, value, (*path, key)) for key, value in raw.items()}
        if origin is Literal and any(raw == one and type(raw) is type(one) for one in get_args(wanted)):
            return raw
        return self.plain(wanted, raw, path)

    def one_of(self, wanted: Any, raw: object, path: lines.Path, default: object) -> Any:
        """`raw` as the first choice that it is."""
        if raw == NONE and types.NoneType in get_args(wanted):
            return None
        choices = [one for one in get_args(wanted) if one is not types.NoneType]
        for choice in choices[:-1]:
            tried = dataclasses.replace(self, problems=[])
            try:
                found = tried.made(choice, raw, path, default)
            except _Wrong:
                continue
            if not tried.problems:
                return found
        return self.made(choices[-1], raw, path, default)

    def items(self, wanted: Any, raw: Sequence[object], path: lines.Path) -> Any:
        """The items of a list, as a tuple unless a list is wanted."""
        inner = get_args(wanted)
        fixed = get_origin(wanted) is tuple and inner[-1] is not Ellipsis
        if fixed and len(inner) != len(raw):
            raise _Wrong
        each = inner if fixed else [inner[0]] * len(raw)
        found = [self.read(one, value, (*path, n)) for n, (one, value) in enumerate(zip(each, raw, strict=True))]
        return found if get_origin(wanted) is list else tuple(found)

    def plain(self, wanted: Any, raw: object, path: lines.Path) -> Any:
        """`raw` as a value that holds no others."""
        if wanted is Any or wanted is object:
            return raw
        if wanted is Path and isinstance(raw, str) and raw:
            folder = Path() if self.override(path) else self.folder
            return Path(os.path.abspath(folder / Path(raw).expanduser()))  # noqa: PTH100 - links stay what they are
        if wanted is float and isinstance(raw, int) and not isinstance(raw, bool):
            return float(raw)
        if isinstance(wanted, type) and type(raw) is wanted:
            return raw
        raise _Wrong


def _types(kind: type[Any]) -> dict[str, Any]:
    """The types of a dataclass's fields by name, in their order."""
    hints = get_type_hints(kind)
    return {one.name: hints[one.name] for one in dataclasses.fields(kind) if one.init}


def _defaults(kind: type[Any], default: object) -> dict[str, Any]:
    """What each field is when it is not written: that of `default`, where this is a `kind`, else the class's own."""
    if type(default) is kind:
        return {name: getattr(default, name) for name in _types(kind)}
    found = {}
    for one in dataclasses.fields(kind):
        if one.init:
            made = one.default_factory
            found[one.name] = made() if made is not _MISSING else one.default
    return found


def _is_union(wanted: Any) -> bool:
    return get_origin(wanted) in (Union, types.UnionType)


def _wanted(wanted: Any) -> str:
    """A type in words."""
    inner, origin = get_args(wanted), get_origin(wanted)
    if _is_union(wanted):
        return " or ".join(f'"{NONE}"' if one is types.NoneType else _wanted(one) for one in inner)
    if origin is Literal:
        return f"one of {', '.join(map(json.dumps, inner))}"
    if origin is tuple and inner[-1] is not Ellipsis:
        return f"a list of {len(inner)} values: {', '.join(map(_wanted, inner))}"
    if origin in (tuple, list, Sequence):
        return f"a list, each {_wanted(inner[0])}"
    if dataclasses.is_dataclass(wanted):
        return f"a table of {', '.join(_types(wanted))}"  # type: ignore[arg-type]
    return _NAMES.get(wanted, "a table" if origin in (dict, Mapping) else str(wanted))


def _offer(wrong: str, kind: type[Any], path: lines.Path) -> str:
    """What to write instead of an unknown key: one of its name further inside, the nearest one here, or all."""
    here = list(_types(kind))
    inside = [name for name in _all_names(kind) if name.rpartition(".")[2] == wrong]
    if inside:
        return f"; did you mean {_dotted((*path, inside[0]))!r}?"
    return _near(wrong, here) or f"; there are {', '.join(here)}"


def _near(wrong: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(wrong[:100], names, 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _all_names(kind: type[Any]) -> list[str]:
    """The dotted names of all keys in the tables of a dataclass."""
    names = []
    for name, wanted in _types(kind).items():
        for one in get_args(wanted) if _is_union(wanted) else (wanted,):
            if dataclasses.is_dataclass(one):
                names += [f"{name}.{inner}" for inner in (*_types(one), *_all_names(one))]  # type: ignore[arg-type]
    return names


def _dotted(path: lines.Path) -> str:
    return ".".join(map(str, path))


def _shown(raw: object) -> str:
    """A value as TOML has it, not too long."""
    try:
        text = _inline(raw)
    except RecipeError:
        text = str(raw)
    return text if len(text) < 80 else f"{text[:76]}..."


# --- writing


def _written(table: Any, path: tuple[str, ...], default: object) -> list[str]:
    """The lines of a table: its values, then the tables in it."""
    values, tables = list[str](), list[str]()
    defaults = _defaults(type(table), default)
    for name in _types(type(table)):
        value, inner = getattr(table, name), (*path, name)
        if value is None and defaults[name] is None:
            continue
        if value == NONE and types.NoneType in get_args(_types(type(table))[name]):
            raise RecipeError([f"{_dotted(inner)} cannot be the text {NONE!r}, which stands for None"])
        if dataclasses.is_dataclass(value):
            tables += ["", f"[{_keys(inner)}]", *_written(value, inner, defaults[name])]
        elif isinstance(value, Mapping):
            tables += ["", f"[{_keys(inner)}]", *(f"{_keys((k,))} = {_inline(v)}" for k, v in value.items())]
        elif isinstance(value, (tuple, list)) and value and all(map(dataclasses.is_dataclass, value)):
            for one in value:
                tables += ["", f"[[{_keys(inner)}]]", *_written(one, inner, _MISSING)]
        else:
            whole = type(value) is int and _is_number(_types(type(table))[name])
            values.append(f"{name} = {_inline(float(value) if whole else value)}")  # as it will be when it is read
    return values + tables


def _is_number(wanted: Any) -> bool:
    """Whether a whole number is read as one with a point."""
    choices = get_args(wanted) if _is_union(wanted) else (wanted,)
    return float in choices and int not in choices


def _keys(path: Sequence[str]) -> str:
    return ".".join(part if _BARE.fullmatch(part) else _quoted(part) for part in path)


def _quoted(text: str) -> str:
    # JSON escapes what TOML wants escaped, but for one control character.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _inline(value: object) -> str:
    """A value on one line."""
    match value:
        case None:
            return _quoted(NONE)
        case bool():
            return str(value).lower()
        case int() | float():
            return repr(value)
        case Path():
            return _quoted(os.path.abspath(value))  # noqa: PTH100 - links stay what they are
        case str():
            return _quoted(value)
        case tuple() | list():
            return f"[{', '.join(map(_inline, value))}]"
        case Mapping():
            return f"{{{', '.join(f'{_keys((str(k),))} = {_inline(v)}' for k, v in value.items())}}}"
    if dataclasses.is_dataclass(value):
        given = {name: getattr(value, name) for name in _types(type(value))}
        plain = _defaults(type(value), _MISSING)
        return _inline({name: one for name, one in given.items() if one is not None or plain[name] is not None})
    raise RecipeError([f"a recipe cannot hold {value!r}"])
