"""Writes a first config: looks at the input's columns and proposes what each is for.

Knows the config's keys as text only; `jobs.config` checks what was written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ID_NAMES = ("id", "row_id", "key", "uid", "uuid", "image_id", "__key__", "name")
IMAGE_NAMES = ("image", "images", "img", "jpg", "png", "image_bytes", "image_path", "image_url")
VIDEO_NAMES = ("video", "videos", "clip", "clips", "mp4", "video_bytes", "video_path", "video_url")
MESSAGE_NAMES = ("messages", "conversations")
_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*( [A-Za-z0-9_./-]+)*[.]?")
_RESERVED = ("true", "false", "null", "yes", "no", "on", "off", "y", "n")
SUFFIXES = {".parquet": "parquet", ".jsonl": "openai", ".tar": "webdataset"}


@dataclass
class Proposal:
    """The answers to init's questions."""

    path: str
    source: str = "parquet"
    model: str = "Qwen/Qwen2.5-VL-7B-Instruct"
    output: str = "out/answers"
    id: str | None = None
    image: str | None = "image"
    video: str | None = None
    messages: str | None = None
    prompts: dict[str, str] = field(default_factory=dict)
    columns: tuple[str, ...] = ()


def propose(path: str) -> Proposal:
    """Guess source and columns from the input's name and, for Parquet, its schema."""
    proposal = Proposal(path=path, source=guess_source(path))
    if proposal.source == "folder":
        if _holds_videos(Path(path)):
            proposal.image, proposal.video = None, "video"
        return proposal
    types = columns_of(path) if proposal.source == "parquet" else {}
    proposal.columns = tuple(types)
    if types:
        proposal.id = _first(types, ID_NAMES)
        proposal.messages = _first(types, MESSAGE_NAMES)
        proposal.video = _first(types, VIDEO_NAMES)
        proposal.image = _first(types, IMAGE_NAMES)
        if proposal.image is None and proposal.video is None:
            proposal.image = _first_binary(types)
    return proposal


def _holds_videos(folder: Path) -> bool:
    """Whether the folder's files are videos and none a picture."""
    from pipeline.sources.folder import SUFFIXES as PICTURES
    from pipeline.sources.folder import VIDEO_SUFFIXES as VIDEOS

    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    moving = any(name.endswith(VIDEOS) and not name.endswith(PICTURES) for name in names)
    return moving and not any(name.endswith(PICTURES) for name in names)


def guess_source(path: str) -> str:
    if Path(path).is_dir():
        inside = {child.suffix for child in Path(path).iterdir()}
        return next((s for suffix, s in SUFFIXES.items() if suffix in inside), "folder")
    suffix = Path(path).suffix
    if suffix in SUFFIXES:
        return SUFFIXES[suffix]
    looks_like_hub_id = path.count("/") == 1 and not path.startswith((".", "/")) and not suffix
    return "hf" if looks_like_hub_id else "parquet"


def columns_of(path: str) -> dict[str, str]:
    """Column names and types of the first file; empty when it cannot be read here."""
    import fsspec
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if Path(path).is_dir():
            path = f"{path.rstrip('/')}/*.parquet"
        files = fsspec.open_files(path, "rb")
        with files[0] as handle:
            schema = pq.read_schema(handle)
    except (OSError, IndexError, ValueError, ImportError, pa.ArrowException):
        return {}
    return {name: str(schema.field(name).type) for name in schema.names}


def _first(types: Mapping[str, str], names: Sequence[str]) -> str | None:
    lower = {name.lower(): name for name in reversed(list(types))}
    return next((lower[name] for name in names if name in lower), None)


def _first_binary(types: Mapping[str, str]) -> str | None:
    return next((name for name, kind in types.items() if "binary" in kind), None)


def render(proposal: Proposal) -> str:
    """The config as commented YAML."""
    prompts = proposal.prompts or {"caption": "Describe this image in detail."}
    lines = [
        "# vlm-batch job: check it with `vlm-batch validate`, look ahead with `vlm-batch plan`.",
        "model:",
        f"  id: {_text(proposal.model)}",
        "input:",
        f"  source: {proposal.source}",
        f"  path: {_text(proposal.path)}",
        *_column("id", proposal.id, "default: file and row number"),
        *_column("image", proposal.image, "bytes, path or URL; a list means several"),
    ]
    if proposal.video:
        lines += _column("video", proposal.video, "likewise; frames as `video:` says")
    if proposal.columns:
        lines.append(f"  # columns here: {', '.join(proposal.columns)}")
    if proposal.messages:
        lines.append(f"  messages: {_text(proposal.messages)}")
    else:
        lines.append("prompts:  # each becomes an answer column; {column} is filled from the row")
        lines += [f"  {name}: {_text(text)}" for name, text in prompts.items()]
    if proposal.video:
        lines.append("video: {fps: 2, max_frames: 64}")
    lines += [
        "generation: {max_new_tokens: 128, temperature: 0.0}",
        "output:",
        f"  path: {_text(proposal.output)}",
    ]
    return "\n".join(lines) + "\n"


def _column(key: str, value: str | None, comment: str) -> list[str]:
    return [f"  {key}: {_text(value) if value else 'null'}  # {comment}"]


def _text(value: Any) -> str:
    """A JSON string is a YAML string; plain words stay without quotes."""
    text = str(value)
    return text if _PLAIN.fullmatch(text) and text.lower() not in _RESERVED else json.dumps(text)
