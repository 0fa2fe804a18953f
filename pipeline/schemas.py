"""The JSON schemas of prompts: read, written compactly, and proved fit to guide an answer.

Knows no tokenizer and no row; the grammar itself is `engine/guided.py`'s.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.settings import PromptSettings


def check_schema(name: str, prompt: PromptSettings) -> None:
    """Raises the UserError of a schema that no answer can be guided by."""
    text = schema_text(name, prompt)
    if text is None:
        return
    from llguidance import LLMatcher

    problem = LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(text))
    if problem:
        reason = " ".join(problem.split())
        raise UserError(f"prompts.{name}.schema cannot be used: {reason}.")


def schema_text(name: str, prompt: PromptSettings) -> str | None:
    """The prompt's JSON schema as compact text, its keys in their order; a path is read here."""
    schema = prompt.schema_
    if schema is None:
        return None
    if isinstance(schema, str):
        schema = _read_schema(name, schema)
    return json.dumps(schema, ensure_ascii=False, separators=(",", ":"))


def _read_schema(name: str, source: str) -> Any:
    try:
        text = source if source.lstrip().startswith("{") else Path(source).read_text("utf-8")
        schema = json.loads(text)
    except (OSError, ValueError) as error:
        raise UserError(f"prompt {name!r}: schema {source!r} cannot be read: {error}") from error
    if not isinstance(schema, dict):
        raise UserError(f"prompt {name!r}: schema {source!r} is no JSON object")
    return schema
