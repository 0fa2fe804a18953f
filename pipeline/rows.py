"""The nouns that every stage passes on, from an input row to its answer.

Fields are filled by the stage that the docstring names and never changed afterwards. Knows no
file format, no model and no device. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from pipeline.errors import RowError

STATES_PER_TOKEN = 10  # image states that cost as much as a prompt's token


PLURALS = {"image": "images", "video": "videos", "audio": "recordings"}  # of `ImageRef.kind`


class RequestKey(NamedTuple):
    """Names one answer: the shard, the row's position in it, and the prompt's name."""

    shard: str
    row: int
    prompt: str


@dataclass(frozen=True, slots=True)
class ImageRef:
    """One image, video or recording by the source: exactly one of `data` and `path` is set."""

    data: bytes | None = None
    path: str | None = None  # local path, fsspec address or URL
    kind: str = "image"  # image | video | audio


@dataclass(frozen=True, slots=True)
class Row:
    """One input record (by `sources`). `index` is its position in the shard, in input order."""

    row_id: str
    index: int
    columns: Mapping[str, Any]
    images: tuple[ImageRef, ...] = ()
    messages: Any = None
    error: RowError | None = None  # the source could not read this row
    videos: tuple[ImageRef, ...] = ()
    audios: tuple[ImageRef, ...] = ()


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """An image, video or recording still encoded: its bytes lie in the spool at `offset`."""

    digest: bytes  # 16 bytes, of the encoded content
    width: int  # pixels as shown: after EXIF orientation, or a video's rotation
    height: int
    spool: str  # path of the spool file
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class View:
    """One picture that a family makes of an image: `box` of it, resized, set on a canvas.

    A box may reach beyond the image, and `resized` at its offset beyond the canvas: the one is
    filled, the other cut away.
    """

    height: int  # of the canvas, in pixels
    width: int
    resized: tuple[int, int]  # height and width of the image on it
    offset: tuple[int, int] = (0, 0)  # of the image's first row and column on it
    fill: tuple[int, int, int] = (0, 0, 0)
    box: tuple[int, int, int, int] | None = None  # left, top, right, bottom; None: all of it
    filter: str = "bicubic"  # bicubic | bilinear | lanczos


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """What a video is, without its frames (by `video_probe`)."""

    width: int  # pixels as shown
    height: int
    num_frames: int
    fps: float  # on average


@dataclass(frozen=True, slots=True)
class Clip:
    """The frames of a video that a model sees, by their numbers in the video, ascending."""

    frames: tuple[int, ...]
    video_fps: float
    fps: float  # of the chosen frames

    @property
    def times(self) -> tuple[float, ...]:
        """Seconds at which the frames stand."""
        return tuple(frame / self.video_fps for frame in self.frames)


@dataclass(frozen=True, slots=True)
class Sound:
    """A recording as models hear it: mono samples at 16 kHz, which are float32 in memory."""

    num_samples: int


@dataclass(frozen=True, slots=True)
class ImageLayout:
    """What a family makes of an image's size: the processed size, its patch grid, its tokens.

    Without `views` the image is resized (bicubic) to height x width, and workers may do that.
    """

    height: int  # pixels after the family's resize
    width: int
    grid: tuple[int, int, int]  # frames, rows, columns of patches
    num_tokens: int
    views: tuple[View, ...] = ()
    clip: Clip | None = None  # of a video, whose pixels are [frames, height, width, 3]
    sound: Sound | None = None  # of a recording, whose samples are uint8 [num_samples, 4]
    num_states: int = 0  # that cross-attention layers read, where tokens do not carry the image
    num_padding_states: int = 0  # more of them, which only tokens before the image read

    @property
    def packed(self) -> tuple[tuple[int, int, str], ...]:
        """(height, width, filter) of a video's views where all of them are plain resizes.

        Workers make these, so that a frame takes no more memory than its views do: its pixels
        are [frames, pixels of all views, 3].
        """
        plain = all(v.box is None and v.resized == (v.height, v.width) for v in self.views)
        if self.clip is None or not plain:
            return ()
        return tuple((view.height, view.width, view.filter) for view in self.views)

    @property
    def state_cost(self) -> int:
        """Tokens whose prefill costs about what the image's states cost; for budgets."""
        return (self.num_states + self.num_padding_states) // STATES_PER_TOKEN


@dataclass(frozen=True, slots=True)
class PlacedImage:
    """An image or the like of a request: its block is `[start, start + layout.num_tokens)`."""

    image: EncodedImage
    layout: ImageLayout
    start: int


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn. `temperature == 0` is greedy; `seed` belongs to the row."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation; `parts` are texts and numbers of images and the like."""

    role: str  # system | user | assistant
    parts: tuple[str | int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One prompt of one row, ready for the planner (by `prepare`)."""

    key: RequestKey
    tokens: np.ndarray  # int32 [T], image placeholders expanded
    images: tuple[PlacedImage, ...]
    positions: np.ndarray  # int32 [axes, T]
    next_position: int  # position of the first generated token on every axis
    sampling: SamplingParams
    schema: str | None = None  # JSON schema text
    text: str | None = None  # the prompt as rendered, where a model runs unfused

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """Leading tokens that all following groups share (by `planner`): keys and values kept once."""

    tokens: np.ndarray  # int32 [P]
    images: tuple[PlacedImage, ...]
    positions: np.ndarray  # int32 [axes, P]


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Requests that share `[num_prefix_tokens, num_shared_tokens)` of their tokens, images too.

    `num_shared_tokens` counts from the prompt's start, so it is at least `num_prefix_tokens`;
    equal means that nothing beyond the prefix is shared. Every request has at least one token
    after `num_shared_tokens`, and no image of a request crosses it.
    """

    requests: tuple[Request, ...]
    num_prefix_tokens: int
    num_shared_tokens: int

    @property
    def images(self) -> tuple[PlacedImage, ...]:
        """Images to encode for the group, once each: the shared ones, then each request's own."""
        shared = [i for i in self.requests[0].images if i.start >= self.num_prefix_tokens]
        own = [i for r in self.requests[1:] for i in r.images if i.start >= self.num_shared_tokens]
        return tuple(shared + own)

    @property
    def num_prefill_tokens(self) -> int:
        own = sum(r.num_tokens - self.num_shared_tokens for r in self.requests)
        return self.num_shared_tokens - self.num_prefix_tokens + own


@dataclass(frozen=True, slots=True)
class Completion:
    """The engine's result of one request."""

    key: RequestKey
    output_ids: tuple[int, ...]
    finish_reason: str  # stop | length | error
    num_prompt_tokens: int
    num_cached_tokens: int
    error: RowError | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """One prompt's final word: text, or an error (by `labeller`); what the journal stores."""

    key: RequestKey
    text: str | None
    finish_reason: str | None = None  # stop | length; None when failed
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    error_code: str | None = None
    error: str | None = None

    @classmethod
    def failed(cls, key: RequestKey, error: RowError) -> Answer:
        return cls(key=key, text=None, error_code=error.code, error=str(error))


@dataclass(frozen=True, slots=True)
class ShardWork:
    """What the labeller is asked for: a shard's rows, without the prompts already answered."""

    shard: str
    rows: Iterable[Row]
    done: frozenset[tuple[int, str]] = field(default_factory=frozenset)  # (row index, prompt)
