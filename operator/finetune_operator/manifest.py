"""Manifests as kubectl reads them: YAML text gives JSON values, or an error that names the line and what to change.

PyYAML alone would not do: it takes `2e-4` for a string and `2026-01-01` for a date, and lets a second key replace the first.
"""

import math
import pathlib
import re
import sys
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

import yaml
from pydantic import BaseModel, JsonValue, ValidationError
from pydantic_core import ErrorDetails

from finetune_api.fields import model_in
from finetune_api.profile import TuningProfile
from finetune_api.v1alpha1 import FineTuneJob

EXIT_REFUSED, EXIT_UNUSABLE = 1, 2
"""What was given has been read and is refused, or could not be read."""
MAX_VALUES = 100_000
"""Most values in a document, aliases written out: a few lines of YAML can otherwise stand for millions."""

Path = tuple[str | int, ...]


class ManifestError(ValueError):
    """Text that is not a Kubernetes manifest. The message names the line."""


class UnreadableError(ManifestError):
    """A file that cannot be read at all. The message says why, and leaves the file's name to the caller."""


class Manifest(dict[str, Any]):
    """One object of a file, and the line of each of its fields."""

    def __init__(self, content: dict[str, Any], lines: dict[Path, int]) -> None:
        super().__init__(content)
        self.lines = lines

    def line(self, path: Path) -> int | None:
        """Line of a field, or of the nearest field around it."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path)


def read_file(file: pathlib.Path) -> list[Manifest]:
    """The objects of a file, or of standard input, which `-` names. Raises ManifestError, and its UnreadableError."""
    try:
        return read_manifests(read_bytes(file).decode("utf-8"))
    except UnicodeDecodeError:
        raise UnreadableError("cannot be read: it is not text in UTF-8") from None


def read_bytes(file: pathlib.Path) -> bytes:
    """What a file that a person names holds, or standard input. Raises UnreadableError."""
    try:
        return sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
    except OSError as error:
        raise UnreadableError(f"cannot be read: {error.strerror}") from None


def exit_code(error: BaseException | None) -> int:
    """A command's exit code after this error: 2, as of wrong usage, where what lies behind it is a file that cannot be read; else 1."""
    if error is None:
        return EXIT_REFUSED
    return EXIT_UNUSABLE if isinstance(error, UnreadableError) else exit_code(error.__cause__)


def read_manifests(text: str) -> list[Manifest]:
    """The objects of a YAML (or JSON) text, in order; empty documents are left out. Raises ManifestError."""
    manifests = []
    try:
        for node in yaml.compose_all(text, Loader=_Loader):
            if node is None or node.tag == _NULL:
                continue
            if not isinstance(node, yaml.MappingNode):
                raise ManifestError(f"line {_line(node)}: a manifest is a mapping (apiVersion, kind, metadata, spec), not {_kind(node)}")
            reader = _Reader()
            manifests.append(Manifest(reader.mapping(node, ()), reader.lines))
    except yaml.MarkedYAMLError as error:
        raise ManifestError(_syntax_message(error)) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ManifestError(f"line {line}: the character U+{error.character:04X} may not stand in YAML; remove it") from None
    except RecursionError:
        raise ManifestError("not a manifest: values are nested too deeply") from None
    return manifests


def explain(error: ValidationError, manifest: Manifest | None = None) -> list[str]:
    """What is wrong, a line of text for each field: "line 9: spec.training.epochs: must be at least 1, not 0"."""
    found: dict[Path, list[str]] = {}
    for detail in error.errors(include_url=False):
        path = _path(detail)
        # A list whose items are at fault is also counted as too short.
        inner_fault = detail["type"] == "too_short" and any(other[: len(path)] == path for other in found)
        message = _message(detail, path, TuningProfile if error.title == TuningProfile.__name__ else FineTuneJob)
        if message.endswith("must be set"):
            message += _null_hint(manifest, path)
        if not inner_fault and message not in found.setdefault(path, []):
            found[path].append(message)
    return [_at(path, manifest) + ", or ".join(messages) for path, messages in found.items()]


# Reading. kubectl's YAML is 1.1 with JSON's exponents: these are the rules of sigs.k8s.io/yaml.

_PREFIX = "tag:yaml.org,2002:"
_NULL, _BOOL, _INT, _FLOAT, _STR = (_PREFIX + name for name in ("null", "bool", "int", "float", "str"))
_MERGE, _MAP, _SEQ = (_PREFIX + name for name in ("merge", "map", "seq"))
_INTEGER = re.compile(r"^[-+]?(0[bB][01_]+|0[xX][0-9a-fA-F_]+|0[oO]?[0-7_]+|[1-9][0-9_]*|0)$")
_NUMBER = re.compile(r"^([-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$")
_TRUE = {"y", "Y", "yes", "Yes", "YES", "true", "True", "TRUE", "on", "On", "ON"}
_FALSE = {"n", "N", "no", "No", "NO", "false", "False", "FALSE", "off", "Off", "OFF"}


class _Loader(yaml.SafeLoader):
    """PyYAML's parser with kubectl's idea of what a plain scalar is."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


_words = "|".join(sorted(_TRUE | _FALSE, key=len, reverse=True))
_Loader.add_implicit_resolver(_BOOL, re.compile(f"^({_words})$"), list("yYnNtTfFoO"))
_Loader.add_implicit_resolver(_INT, _INTEGER, list("-+0123456789"))
_Loader.add_implicit_resolver(_FLOAT, _NUMBER, list("-+0123456789."))
_Loader.add_implicit_resolver(_NULL, re.compile(r"^(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(_MERGE, re.compile(r"^<<$"), ["<"])


class _Reader:
    """Turns the nodes of one document into JSON values and remembers their lines."""

    def __init__(self) -> None:
        self.lines: dict[Path, int] = {}
        self._open: list[yaml.Node] = []
        self._count = 0

    def value(self, node: yaml.Node, path: Path) -> JsonValue:
        """The JSON value of a node. Raises ManifestError."""
        self._count += 1
        if self._count > MAX_VALUES:
            raise ManifestError(f"line {_line(node)}: the document holds more than {MAX_VALUES} values")
        if any(node is outer for outer in self._open):
            raise ManifestError(f"line {_line(node)}: an alias must not contain itself")
        if isinstance(node, yaml.CollectionNode) and node.tag not in (_MAP, _SEQ):
            raise ManifestError(f"line {_line(node)}: the tag {node.tag!r} has no meaning in a manifest; remove it")
        self.lines.setdefault(path, _line(node))
        self._open.append(node)
        try:
            if isinstance(node, yaml.MappingNode):
                return self.mapping(node, path)
            if isinstance(node, yaml.SequenceNode):
                return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
            return _scalar(node)
        finally:
            self._open.pop()

    def mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        """The JSON object of a mapping. Raises ManifestError."""
        merged: dict[str, Any] = {}
        own: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _MERGE:
                for source in _merge_sources(value_node):
                    merged = {**self.mapping(source, path), **merged}
                continue
            key = _key(key_node)
            if key in own:
                raise ManifestError(f"line {_line(key_node)}: {_dotted((*path, key))} stands twice; keep one")
            self.lines[(*path, key)] = _line(key_node)
            own[key] = self.value(value_node, (*path, key))
        return {**merged, **own}


def _merge_sources(node: yaml.Node) -> Iterator[yaml.MappingNode]:
    nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
    for source in nodes:
        if not isinstance(source, yaml.MappingNode):
            raise ManifestError(f"line {_line(source)}: << takes a mapping, or a list of mappings")
        yield source


def _scalar(node: yaml.Node) -> JsonValue:
    text = str(node.value)
    if node.tag == _STR:
        return text
    if node.tag == _NULL:
        return None
    if node.tag == _BOOL and text in _TRUE | _FALSE:
        return text in _TRUE
    if node.tag == _INT and _INTEGER.match(text):
        return _integer(text)
    if node.tag in (_INT, _FLOAT) and _NUMBER.match(text):
        return _number(node)
    raise ManifestError(
        f"line {_line(node)}: {text!r} with the tag {node.tag!r} has no meaning in a manifest; remove the tag or quote the value"
    )


def _integer(text: str) -> int:
    digits = text.replace("_", "").lower()
    sign, digits = (-1, digits[1:]) if digits[0] == "-" else (1, digits.lstrip("+"))
    if digits.startswith("0") and digits[1:].isdigit():  # 0644 is octal, as in YAML 1.1
        return sign * int(digits, 8)
    return sign * int(digits, 0)


def _number(node: yaml.Node) -> int | float:
    text = node.value.replace("_", "")
    number = float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    if not math.isfinite(number):
        raise ManifestError(f"line {_line(node)}: {node.value} is not a number that JSON can hold")
    # kubectl writes a whole number without its point, so an integer field takes `3.0` and `1e3`.
    return int(number) if number.is_integer() and abs(number) < 1e21 else number


def _key(node: yaml.Node) -> str:
    key = _scalar(node) if isinstance(node, yaml.ScalarNode) else None
    if key is None:
        raise ManifestError(f"line {_line(node)}: a key must be a word")
    return {True: "true", False: "false"}[key] if isinstance(key, bool) else str(key)


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _kind(node: yaml.Node) -> str:
    return "a list" if isinstance(node, yaml.SequenceNode) else f"{node.value!r}"


def _syntax_message(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    problem = error.problem or error.context or "not YAML"
    if "'\\t'" in problem:
        problem += "; indent with spaces"
    elif "mapping values are not allowed" in problem:
        problem += "; check the indentation, and quote values that contain ': '"
    return where + problem


# Explaining.

_UNION_LABELS = re.compile(r"^(int|str|constrained-int|constrained-str|literal\[.*\]|function-.*|\[key\])$")
_WANTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "string_type": "a string",
    "bool_type": "true or false",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "dict_type": "a mapping",
    "tuple_type": "a list",
    "list_type": "a list",
}
_BOUNDS = {
    "greater_than": ("gt", "be larger than"),
    "greater_than_equal": ("ge", "be at least"),
    "less_than": ("lt", "be smaller than"),
    "less_than_equal": ("le", "be at most"),
    "too_long": ("max_length", "have no more entries than"),
    "too_short": ("min_length", "have entries, at least"),
    "string_too_long": ("max_length", "have no more characters than"),
    "string_too_short": ("min_length", "have characters, at least"),
}


def _path(detail: ErrorDetails) -> Path:
    """Where in the manifest: pydantic's location without the names of a union's members."""
    loc = detail["loc"]
    # An unknown field may have any name, also that of a union's member.
    label = len(loc) - (detail["type"] == "extra_forbidden")
    return tuple(part for place, part in enumerate(loc) if not (place < label and isinstance(part, str) and _UNION_LABELS.match(part)))


def _message(detail: ErrorDetails, path: Path, root: type[BaseModel]) -> str:
    kind, given, bounds = detail["type"], detail["input"], detail.get("ctx", {})
    if kind == "missing":
        return "is required"
    if kind == "extra_forbidden":
        return "unknown field" + _suggestion(path, root)
    if kind in _WANTED:
        quoted = isinstance(given, str) and kind in ("int_type", "float_type", "bool_type") and _plain(given)
        return f"must be {_WANTED[kind]}, not {_shown(given)}" + ("; remove the quotes" if quoted else "")
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        return f"must {words} {bounds[name]}{'' if isinstance(given, (dict, list)) else f', not {_shown(given)}'}"
    if kind == "literal_error":
        return f"must be {'one of ' if ' or ' in bounds['expected'] else ''}{bounds['expected']}, not {_shown(given)}"
    message = str(bounds["error"]) if kind == "value_error" else detail["msg"]
    return f"{message}, not {_shown(given)}" if message.startswith("must be ") else message


def _plain(text: str) -> bool:
    return bool(_NUMBER.match(text) or text in ("true", "false"))


def _shown(value: object) -> str:
    if isinstance(value, (dict, list)):
        return "a mapping" if isinstance(value, dict) else "a list"
    text = {None: "null", True: "true", False: "false"}.get(value) if value is None or isinstance(value, bool) else repr(value)
    text = text or ""
    return text if len(text) <= 80 else f"{text[:77]}..."


def _suggestion(path: Path, root: type[BaseModel]) -> str:
    known = fields_at(path[:-1], root)
    close = get_close_matches(str(path[-1]), known, n=1, cutoff=0.7)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; known here: {', '.join(known)}" if known else ""


def _null_hint(manifest: Manifest | None, path: Path) -> str:
    """A key without a value is null, which is as if it were absent; people mean the defaults."""
    value: object = manifest
    for part in path:
        if isinstance(value, dict):
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int):
            value = value[part]
    names = [name for name, item in value.items() if item is None] if isinstance(value, dict) else []
    return f"; {names[0]} has no value here: write `{names[0]}: {{}}` for its defaults" if names else ""


def fields_at(path: Path, root: type[BaseModel] = FineTuneJob) -> tuple[str, ...]:
    """Names of the fields that may stand at a place of an object, as a manifest writes them; () where there is no such place."""
    model: type[BaseModel] | None = root
    for part in path:
        if model is None:
            return ()
        if isinstance(part, int):
            continue
        model = next((model_in(field.annotation) for name, field in model.model_fields.items() if part == (field.alias or name)), None)
    return tuple(field.alias or name for name, field in model.model_fields.items()) if model else ()


def _dotted(path: Path) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _at(path: Path, manifest: Manifest | None) -> str:
    line = manifest.line(path) if manifest is not None else None
    return (f"line {line}: " if line else "") + (f"{_dotted(path)}: " if path else "")
