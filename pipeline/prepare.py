"""A row becomes requests: images stored and measured, prompts filled, tokens and positions.

Bytes of images and videos go to the spool; only their headers are read here. A row that cannot
be prepared becomes failed answers. Knows no batch and no device. Imports no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from pipeline import images, media
from pipeline.errors import RowError
from pipeline.models.family import GREEDY_BELOW, Family, check_inputs
from pipeline.prompts import PromptText, message_turns, prompt_turns
from pipeline.rows import (
    PLURALS,
    Answer,
    EncodedImage,
    ImageLayout,
    ImageRef,
    PlacedImage,
    Request,
    RequestKey,
    Row,
    SamplingParams,
    Turn,
)
from pipeline.schemas import schema_text
from pipeline.settings import GenerationSettings, LabelSettings, PromptSettings
from pipeline.tokenizer import Tokenizer
from pipeline.video_probe import VideoProber

_ROW_TROUBLE = (RowError, ValueError, TypeError, OverflowError)  # text that no tokenizer takes
MESSAGES_PROMPT = "answer"  # the prompt's name where the rows bring messages


class ImageStore(Protocol):
    """Where encoded images wait: `pipeline.spool.Spool`, or `Unstored` for estimates."""

    def add(self, shard: str, data: bytes) -> tuple[bytes, str, int, int]:
        """Keep `data`; returns digest, path, offset and length."""


class Unstored:
    """Keeps nothing: for estimates, which need digests only."""

    def add(self, shard: str, data: bytes) -> tuple[bytes, str, int, int]:
        return hashlib.blake2b(data, digest_size=16).digest(), "", 0, len(data)


class Preparer:
    """Turns rows into requests for one family and one set of prompts."""

    def __init__(
        self,
        settings: LabelSettings,
        family: Family,
        tokenizer: Tokenizer,
        store: ImageStore,
        load: Callable[[ImageRef], bytes] | None = None,
    ) -> None:
        self._settings = settings
        self._family = family
        self._tokenizer = tokenizer
        self._store = store
        self._load = load or (lambda ref: media.load(ref, settings.input))
        self._prober = VideoProber(settings.input)
        check_inputs(family, settings)
        self._messages = settings.input.messages is not None
        self._texts = {name: PromptText(name, p.text) for name, p in settings.prompts.items()}
        self._schemas = {name: schema_text(name, p) for name, p in settings.prompts.items()}
        self._sampling = {
            name: sampling_params(family, settings.generation, settings.prompts.get(name))
            for name in self.prompt_names
        }
        self._context = min(
            family.context_length, settings.engine.max_context or family.context_length
        )
        tokenizer.protect(family.control)

    def close(self) -> None:
        """End the process that measures videos, if there was one to measure."""
        self._prober.close()

    @property
    def prompt_names(self) -> tuple[str, ...]:
        return (MESSAGES_PROMPT,) if self._messages else tuple(self._texts)

    def prepare(
        self, shard: str, row: Row, done: Collection[tuple[int, str]] = frozenset()
    ) -> Iterator[Request | Answer]:
        """Yield one request or failed answer for each of the row's prompts that is not done."""
        wanted = [name for name in self.prompt_names if (row.index, name) not in done]
        if not wanted:
            return
        try:
            requests = self._row_requests(shard, row, wanted)
        except _ROW_TROUBLE as error:
            failure = _row_error(error)
            requests = [Answer.failed(RequestKey(shard, row.index, n), failure) for n in wanted]
        yield from requests

    def _row_requests(self, shard: str, row: Row, wanted: Sequence[str]) -> list[Request | Answer]:
        if row.error is not None:
            raise row.error
        if self._messages:
            turns, refs = message_turns(row, self._settings.system)
            stored = self._media(shard, refs)
            return [self._request(RequestKey(shard, row.index, wanted[0]), row, turns, stored)]
        if self._settings.input.image is not None and not row.images:
            raise RowError("missing_image")
        if self._settings.input.video is not None and not row.videos:
            raise RowError("missing_video")
        if self._settings.input.audio is not None and not row.audios:
            raise RowError("missing_audio")
        stored = self._media(shard, (*row.images, *row.videos, *row.audios))
        return [self._prompt_request(shard, row, name, stored) for name in wanted]

    def _prompt_request(
        self, shard: str, row: Row, name: str, stored: Sequence[tuple[EncodedImage, ImageLayout]]
    ) -> Request | Answer:
        key = RequestKey(shard, row.index, name)
        try:
            text = self._texts[name].fill(row.columns)
            turns = prompt_turns(text, len(stored), self._settings.system)
            return self._request(key, row, turns, stored)
        except _ROW_TROUBLE as error:
            return Answer.failed(key, _row_error(error))

    def _media(
        self, shard: str, refs: Sequence[ImageRef]
    ) -> list[tuple[EncodedImage, ImageLayout]]:
        """Images, videos and recordings in the order of `refs`, stored and laid out."""
        settings = self._settings.input
        limits = {"image": settings.max_images, "video": settings.max_videos}
        limits["audio"] = settings.max_audios
        counts = {kind: sum(ref.kind == kind for ref in refs) for kind in limits}
        for kind, limit in limits.items():
            if counts[kind] > limit:
                message = f"The row has {counts[kind]} {PLURALS[kind]}, more than {limit}."
                raise RowError(f"too_many_{kind}s", message)
            if counts[kind] and kind not in self._family.takes:
                raise RowError("unsupported_input", f"The model takes no {PLURALS[kind]}.")
        read = {"video": self._video, "audio": self._audio}
        return [
            read[ref.kind](shard, ref)
            if ref.kind in read
            else self._image(shard, ref, counts["image"])
            for ref in refs
        ]

    def _audio(self, shard: str, ref: ImageRef) -> tuple[EncodedImage, ImageLayout]:
        data = self._load(ref)
        layout = self._family.audio_layout(self._prober.probe_audio(data))
        digest, path, offset, num_bytes = self._store.add(shard, data)
        return EncodedImage(digest, layout.width, layout.height, path, offset, num_bytes), layout

    def _video(self, shard: str, ref: ImageRef) -> tuple[EncodedImage, ImageLayout]:
        data = self._load(ref)
        info = self._prober.probe(data)
        layout = self._family.video_layout(info, self._settings.video)
        digest, path, offset, num_bytes = self._store.add(shard, data)
        return EncodedImage(digest, info.width, info.height, path, offset, num_bytes), layout

    def _image(
        self, shard: str, ref: ImageRef, num_images: int
    ) -> tuple[EncodedImage, ImageLayout]:
        data = self._load(ref)
        width, height = images.probe(data, self._settings.input.max_pixels)
        layout = self._family.layout(width, height, num_images)
        digest, path, offset, num_bytes = self._store.add(shard, data)
        return EncodedImage(digest, width, height, path, offset, num_bytes), layout

    def _request(
        self,
        key: RequestKey,
        row: Row,
        turns: Sequence[Turn],
        stored: Sequence[tuple[EncodedImage, ImageLayout]],
    ) -> Request:
        layouts = [layout for _, layout in stored]
        tokens, starts = self._family.tokenize(turns, layouts, self._tokenizer)
        placed = tuple(
            PlacedImage(image, layout, start)
            for (image, layout), start in zip(stored, starts, strict=True)
        )
        sampling = self._sampling[key.prompt]
        self._check_length(tokens, sampling, layouts)
        positions, following = self._family.positions(tokens, placed)
        return Request(
            key=key,
            tokens=tokens,
            images=placed,
            positions=positions,
            next_position=following,
            sampling=_seeded(sampling, row.row_id, key.prompt),
            schema=self._schemas.get(key.prompt),
            text=self._family.prompt_text(turns),
        )

    def _check_length(
        self, tokens: np.ndarray, sampling: SamplingParams, layouts: Sequence[ImageLayout]
    ) -> None:
        needed = len(tokens) + sampling.max_new_tokens
        if needed > self._context:
            raise RowError(
                "prompt_too_long",
                f"The prompt's {len(tokens)} tokens and {sampling.max_new_tokens} for the answer"
                f" exceed the context of {self._context}.{_advice(layouts)}",
            )


def _advice(layouts: Sequence[ImageLayout]) -> str:
    tokens = sum(layout.num_tokens for layout in layouts if layout.clip is not None)
    if not tokens:
        return ""
    return f" Its videos take {tokens}: lower video.max_frames or video.max_pixels."


def _row_error(error: Exception) -> RowError:
    if isinstance(error, RowError):
        return error
    return RowError("prepare_error", f"{type(error).__name__}: {error}")


def sampling_params(
    family: Family, generation: GenerationSettings, prompt: PromptSettings | None = None
) -> SamplingParams:
    """The checkpoint's defaults, then the job's settings, then the prompt's own limit."""
    chosen: dict[str, Any] = dict(family.default_sampling)
    chosen.update(generation.model_dump(exclude_none=True))
    if prompt is not None and prompt.max_new_tokens is not None:
        chosen["max_new_tokens"] = prompt.max_new_tokens
    if chosen.get("temperature", 0.0) < GREEDY_BELOW:
        chosen["temperature"] = 0.0
    return SamplingParams(stop_token_ids=family.eos_token_ids, **chosen)


def _seeded(sampling: SamplingParams, row_id: str, prompt: str) -> SamplingParams:
    named = f"{sampling.seed}\0{row_id}\0{prompt}".encode("utf-8", "surrogatepass")
    seed = int.from_bytes(hashlib.blake2b(named, digest_size=8).digest(), "little") >> 1
    return replace(sampling, seed=seed)
