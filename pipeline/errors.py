"""The errors that a row, an attempt or a user can meet, and the table of row error codes.

Knows nothing of where errors are stored or how often anything is tried again. Imports no torch.
"""

from __future__ import annotations

import re
from types import MappingProxyType

CODES = MappingProxyType(
    {
        # input
        "missing_image": "The row has no image although the job reads one.",
        "missing_video": "The row has no video although the job reads one.",
        "missing_audio": "The row has no recording although the job reads one.",
        "missing_file": "The file that a path names does not exist or cannot be read.",
        "bad_row": "The row's values have types that the job cannot use.",
        "bad_messages": "The messages column does not hold OpenAI-style turns.",
        "bad_prompt": "The prompt cannot be filled from the row's columns.",
        "duplicate_id": "Another row of the shard already has this id.",
        # images
        "empty_image": "The image has no bytes.",
        "not_an_image": "The bytes are no image of a supported format.",
        "unsupported_format": "The image's format is known and not supported.",
        "truncated_image": "The image ends before its last pixel.",
        "corrupt_image": "The image cannot be decoded.",
        "image_too_large": "The image has more pixels than input.max_pixels.",
        "file_too_large": "The file has more bytes than its kind's limit in the input settings.",
        "bad_aspect_ratio": "The image is longer than the model accepts for its width.",
        "too_many_images": "The row has more images than input.max_images.",
        # videos
        "empty_video": "The video has no bytes or no frames.",
        "not_a_video": "The bytes are no video of a supported container.",
        "no_video_stream": "The file has no pictures, only sound or text.",
        "truncated_video": "The video ends before the end that its container names.",
        "video_unreadable": "The video cannot be decoded.",
        "video_too_large": "The video's frames have more pixels than input.max_pixels.",
        "video_too_long": "The video lasts longer than input.max_video_sec.",
        "too_many_frames": "The image or video has more frames than allowed.",
        "too_many_videos": "The row has more videos than input.max_videos.",
        "video_timeout": "The video was not read within input.video_timeout_sec.",
        # recordings
        "empty_audio": "The recording has no bytes, or too few samples to hear.",
        "not_audio": "The bytes are no recording of a supported format.",
        "truncated_audio": "The recording ends before the end that its header names.",
        "corrupt_audio": "The recording cannot be decoded.",
        "audio_too_long": "The recording lasts longer than input.max_audio_sec.",
        "audio_timeout": "The recording was not measured within input.video_timeout_sec.",
        "too_many_audios": "The row has more recordings than input.max_audios or the model take.",
        # remote images and videos
        "remote_disabled": "The image or video is a URL and input.remote is off.",
        "remote_forbidden": "The URL leads to a private or local address.",
        "remote_failed": "The URL cannot be read.",
        "remote_timeout": "The URL did not answer in time.",
        "remote_too_many_redirects": "The URL redirects more often than allowed.",
        # prompts
        "prompt_too_long": "The prompt and its answer do not fit the model's context.",
        "unsupported_input": "The model does not take this kind of input.",
        # generation
        "out_of_memory": "The row does not fit the device's memory even alone.",
        "numerical_error": "The model's output for this row is not a number.",
        "schema_invalid": "The answer does not follow the prompt's schema.",
        "engine_error": "The engine failed on this row.",
        "worker_crash": "The row brought a worker down twice.",
        "prepare_error": "The row could not be prepared; the message names the reason.",
    }
)


_SECRETS = (
    (re.compile(r"(?<=://)[^/@\s]+@"), "***@"),
    (re.compile(r"\bA[KS]IA[0-9A-Z]{12,}(:[^@\s]+(?=@))?"), "***"),
    (
        re.compile(
            r"([?&](?:[\w-]*(?:signature|credential|token|password|secret|api-?_?key)|sig|"
            r"awsaccesskeyid)=)[^&#\s'\"]+",
            re.IGNORECASE,
        ),
        r"\1***",
    ),
)


def without_secrets(text: str) -> str:
    """`text` without what opens doors: users in addresses, AWS keys, signatures in queries."""
    for pattern, mask in _SECRETS:
        text = pattern.sub(mask, text)
    return text


class RowError(Exception):
    """Ends one row: a code of `CODES` and a sentence for the person who reads the output."""

    def __init__(self, code: str, message: str | None = None) -> None:
        if code not in CODES:
            raise ValueError(f"unknown row error code {code!r}")
        message = message and without_secrets(message)
        super().__init__(code, message)
        self.code = code
        self.message = message or CODES[code]

    def __str__(self) -> str:
        return self.message


class _Told(Exception):
    """Told to people, in logs and on terminals: without secrets."""

    def __str__(self) -> str:
        return without_secrets(super().__str__())


class EngineError(_Told):
    """Ends the attempt: the device or the model is unusable, another attempt may succeed."""


class UserError(_Told):
    """The user's mistake: one sentence that says what is wrong and what to write instead."""
