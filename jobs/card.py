"""The dataset card of an export: how the answers were made, so that a reader can judge them.

Everything in it comes from the manifest and the rows; it claims no licence and no quality.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from jobs.join import Joined
from jobs.manifest import Manifest

_SIZES = (
    (1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"),
    (10_000_000, "1M<n<10M"), (100_000_000, "10M<n<100M"), (1_000_000_000, "100M<n<1B"),
)  # fmt: skip
_OWN_COLUMNS = {
    "row_id": "the input row's id",
    "status": "`ok`, `failed` or `filtered`",
    "error_code": "why a row failed, for programs",
    "error": "why a row failed, one sentence",
    "meta": "for each prompt: finish reason, token counts, attempt, its own error",
}


def write_card(
    path: Path,
    manifest: Manifest,
    schema: pa.Schema,
    num_rows: int,
    states: Counter[str],
    joined: Sequence[Joined] = (),
) -> None:
    """Write README.md with the header that the Hugging Face hub reads."""
    told = [_header(num_rows), _body(manifest, schema, num_rows, states)]
    path.write_text("\n".join([*told, *map(_joined, joined)]), encoding="utf-8")


def _joined(other: Joined) -> str:
    """How the answers of a joined run folder were made."""
    manifest = other.manifest
    return (
        f"## Joined answers `{other.label}`\n\nOf `{manifest.model.get('id')}`, job fingerprint "
        f"`{manifest.fingerprint}`.\n\n{_prompts(manifest.config)}\n\n{_block(_settings(manifest.config))}\n"
    )


def _header(num_rows: int) -> str:
    size = next((name for limit, name in _SIZES if num_rows < limit), "n>1T")
    header = {
        "tags": ["vlm-batch", "synthetic"],
        "size_categories": [size],
        "configs": [{"config_name": "default", "data_files": "data/train-*.parquet"}],
    }
    return f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n"


def _body(manifest: Manifest, schema: pa.Schema, num_rows: int, states: Counter[str]) -> str:
    model, config = manifest.model, manifest.config
    revision = f" at `{model['revision']}`" if model.get("revision") else ""
    counts = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    parts = [
        f"# Answers of {model.get('id', 'a model')}",
        f"{num_rows} rows ({counts}), answered by `{model.get('id')}`{revision} with vlm-batch "
        f"{manifest.packages.get('vlm-batch', '')}; the job was made on {manifest.created}. "
        "The answers are a model's and were not checked by a person.",
        "## Prompts",
        _prompts(config),
        "## Settings",
        _block(_settings(config)),
        "## Columns",
        _columns(schema, config),
        "## Made with",
        f"Job fingerprint `{manifest.fingerprint}`; "
        + ", ".join(f"{name} {version}" for name, version in manifest.packages.items())
        + ".",
    ]
    return "\n\n".join(parts) + "\n"


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """Those that change answers."""
    found = {key: config.get(key) for key in ("generation", "model")}
    cache = (config.get("engine") or {}).get("kv_cache", "auto")
    return found if cache == "auto" else found | {"engine": {"kv_cache": cache}}


def _prompts(config: dict[str, Any]) -> str:
    prompts = {name: prompt["text"] for name, prompt in config.get("prompts", {}).items()}
    told = {"system": config["system"]} if config.get("system") else {}
    if not prompts:
        return f"Each row's own messages, column `{config['input']['messages']}`."
    return _block(told | prompts)


def _columns(schema: pa.Schema, config: dict[str, Any]) -> str:
    lines = ["| column | type | what |", "| --- | --- | --- |"]
    keep = config.get("input", {}).get("keep", ())
    for field in schema:
        what = _OWN_COLUMNS.get(field.name)
        if what is None:
            what = "kept from the input" if field.name in keep else "the answer"
        type_ = "struct" if field.name == "meta" else str(field.type)
        lines.append(f"| `{field.name}` | `{type_}` | {what} |")
    return "\n".join(lines)


def _block(values: dict[str, Any]) -> str:
    return f"```json\n{json.dumps(values, indent=2, ensure_ascii=False)}\n```"
