"""YAML with memory: where each key stands, and which values came from the environment.

Expands `${NAME}` and `${NAME:-default}` in scalars (`$${` is a plain `${`). Knows nothing of what
the keys mean.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from pipeline.errors import UserError

Path = tuple[str | int, ...]

_REFERENCE = re.compile(r"\$(\$\{)|\$\{([^}]*)\}")
_NAME = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(?::-(.*))?", re.DOTALL)
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASS|PWD|CRED|AUTH", re.IGNORECASE)
_MAX_VALUES = 100_000  # of one document, aliases written out
_MAX_DEPTH = 64
_NULLS = frozenset({"", "~", "null", "Null", "NULL"})


@dataclass
class YamlSource:
    """A document as plain values, with the place of each key and each secret's reference."""

    name: str  # what messages call it
    values: dict[str, Any]
    places: dict[Path, str] = field(default_factory=dict)  # "line 7", "--set a.b"
    secrets: dict[str, str] = field(default_factory=dict)  # dotted key -> text with ${NAME}

    def place(self, path: Path) -> str:
        """Where the key, or the nearest key around it, was written."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.places:
                return self.places[path[:end]]
        return self.name

    def set(self, assignment: str, env: Mapping[str, str] | None = None) -> None:
        """Apply one `a.b=value` on top; the value is YAML.

        Raises: UserError.
        """
        key, equals, text = assignment.partition("=")
        path = tuple(key.strip().split("."))
        if not equals or not all(path):
            raise UserError(f"--set {assignment}: write it as key=value, e.g. --set a.b=1.")
        place = f"--set {key.strip()}"
        builder = _Builder(place, os.environ if env is None else env, fixed_place=place)
        value = builder.build(_compose_value(text, place), path)
        target = self.values
        for number, part in enumerate(path[:-1]):
            inner = target.get(part)
            if part == "prompts" or inner is None or isinstance(inner, dict):
                target = target.setdefault(part, {}) if inner is None else inner
            elif number == 1 and path[0] == "prompts" and isinstance(inner, str):
                target[part] = {"text": inner}  # a prompt in short form grows a key
                target = target[part]
            else:
                raise UserError(f"{place}: {'.'.join(path[: number + 1])} has no keys of its own.")
            if inner is None:
                target_parent = path[: number + 1]
                self.places.setdefault(target_parent, place)
        target[path[-1]] = value
        self.places = {k: v for k, v in self.places.items() if k[: len(path)] != path}
        self.places.update(builder.places)
        dotted = ".".join(path)
        kept = {k: v for k, v in self.secrets.items() if not (k + ".").startswith(dotted + ".")}
        self.secrets = kept | builder.secrets


def parse_yaml(text: str, name: str, env: Mapping[str, str] | None = None) -> YamlSource:
    """Read one YAML mapping.

    Raises: UserError with the line.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        written = "".join(text.splitlines()[mark.line :][:1]) if mark else ""
        problem = _explain(error.problem or error.context or "", written)
        raise UserError(f"{name}{line}: not valid YAML: {problem}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{name}: not valid YAML: {reason}.") from error
    except RecursionError as error:
        raise _too_deep(name) from error
    if node is None:
        return YamlSource(name, {})
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{name}, line 1: a config is a mapping of keys to values.")
    builder = _Builder(name, os.environ if env is None else env)
    try:
        values = builder.build(node, ())
    except RecursionError as error:  # a merge key that leads to itself
        raise _too_deep(name) from error
    return YamlSource(name, values, builder.places, builder.secrets)


def expand(text: str, env: Mapping[str, str], where: str) -> tuple[str, bool]:
    """Fill `${NAME}` references; says too whether any of them names a secret.

    Raises: UserError for a variable that is not set and has no default.
    """
    secret = False

    def fill(match: re.Match[str]) -> str:
        nonlocal secret
        if match.group(1):
            return "${"
        parts = _NAME.fullmatch(match.group(2))
        if parts is None:
            raise UserError(
                f"{where}: ${{{match.group(2)}}} is no variable; write $${{ for a literal ${{."
            )
        variable, default = parts.groups()
        secret = secret or bool(_SECRET.search(variable))
        value = env.get(variable, default)
        if value is None:
            raise UserError(
                f"{where}: the environment variable {variable} is not set; set it, or write "
                f"${{{variable}:-default}}."
            )
        return value

    return _REFERENCE.sub(fill, text), secret


class _Builder:
    """Turns nodes into values and notes places and secrets on the way."""

    def __init__(self, name: str, env: Mapping[str, str], fixed_place: str | None = None) -> None:
        self.name = name
        self.env = env
        self.fixed_place = fixed_place
        self.places: dict[Path, str] = {}
        self.secrets: dict[str, str] = {}
        self.num_values = 0

    def build(self, node: yaml.Node, path: Path) -> Any:
        self.num_values += 1
        if self.num_values > _MAX_VALUES:
            raise UserError(f"{self._place(node)}: a config has at most {_MAX_VALUES:,} values.")
        if len(path) > _MAX_DEPTH:
            raise _too_deep(self._place(node))
        self.places.setdefault(path, self._place(node))
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(child, (*path, i)) for i, child in enumerate(node.value)]
        return self._scalar(node, path)

    def _merge(self, node: yaml.MappingNode) -> None:
        """Write merge keys (`<<: *anchor`) out in place, each key once; own keys win."""
        own: set[str] = set()
        for key_node, _child in node.value:
            key = str(key_node.value)
            if key in own:
                raise UserError(f"{self._place(key_node)}: the key `{key}` stands here twice.")
            own.add(key)
        try:
            _loader().flatten_mapping(node)
        except yaml.MarkedYAMLError as error:
            raise UserError(f"{self._place(node)}: not valid YAML: {error.problem}.") from error
        node.value = list({str(pair[0].value): pair for pair in node.value}.values())

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        self._merge(node)
        values: dict[str, Any] = {}
        for key_node, child in node.value:
            key = str(key_node.value)
            self.places[(*path, key)] = self._place(key_node)
            values[key] = self.build(child, (*path, key))
        return values

    def _scalar(self, node: yaml.Node, path: Path) -> Any:
        text = node.value
        if isinstance(text, str) and "${" in text:
            value, secret = expand(text, self.env, self._place(node))
            if secret:
                self.secrets[".".join(map(str, path))] = text
            whole = getattr(node, "style", None) is None and _REFERENCE.fullmatch(text)
            return None if whole and value in _NULLS else value
        try:
            return _loader().construct_object(node, deep=True)
        except (yaml.YAMLError, ValueError) as error:
            raise UserError(f"{self._place(node)}: {text!r} cannot be read: {error}.") from error

    def _place(self, node: yaml.Node) -> str:
        return self.fixed_place or f"{self.name}, line {node.start_mark.line + 1}"


def _explain(problem: str, written: str) -> str:
    """The parser's words, with what to write instead where that is known."""
    if problem == "mapping values are not allowed here":
        return problem + " (a text that holds `: ` needs quotes)"
    if re.search(r"[\[{].*\$\{", written):
        return problem + " (inside `{ }` or `[ ]`, a text with `${NAME}` needs quotes)"
    return problem


def _too_deep(place: str) -> UserError:
    return UserError(f"{place}: a config nests at most {_MAX_DEPTH} levels.")


def _loader() -> yaml.SafeLoader:
    return yaml.SafeLoader("")


def _compose_value(text: str, place: str) -> yaml.Node:
    """The node of a `--set` value: YAML where it is a scalar, `[..]` or `{..}`, else plain text."""
    plain = yaml.ScalarNode("tag:yaml.org,2002:str", text, _mark(), _mark())
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        if text.lstrip()[:1] in ("[", "{"):
            raise UserError(f"{place}: {text!r} is not valid YAML.") from error
        return plain
    except RecursionError as error:
        raise _too_deep(place) from error
    if node is None:
        return yaml.ScalarNode("tag:yaml.org,2002:null", "null", _mark(), _mark())
    is_flow = getattr(node, "flow_style", True)
    return node if isinstance(node, yaml.ScalarNode) or is_flow else plain


def _mark() -> yaml.Mark:
    return yaml.Mark("--set", 0, 0, 0, None, 0)
