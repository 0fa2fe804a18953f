"""What the pipeline can be told: frozen settings with their defaults, once.

`jobs/config.py` nests these in the job's config. Knows no run folder. Imports no torch.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Positive = Annotated[int, Field(ge=1)]


class Settings(BaseModel):
    """Base of all settings: frozen, and an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False
    )


class ModelSettings(Settings):
    """Which checkpoint answers, and how it is loaded."""

    id: str = Field(description="Hub id, local folder, or `demo`, the model that ships.")
    revision: str = Field("main", description="A hub id's revision; resolved and recorded.")
    chat_template: str = Field("auto", description="`auto`, or a template's public name.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="`auto` is bfloat16 on a GPU and float32 on a CPU."
    )
    quantization: Literal["none", "fp8"] = Field(
        "none", description="none, or fp8: the decoder's weights in a byte each."
    )
    max_pixels: int | None = Field(None, ge=1, description="Pixels an image is resized to at most.")
    min_pixels: int | None = Field(None, ge=1, description="Pixels an image has at least.")
    pan_and_scan: bool = Field(False, description="Gemma 3: crops of long images beside the whole.")


class InputSettings(Settings):
    """Where rows come from and which columns mean what."""

    source: Literal["parquet", "hf", "webdataset", "openai", "folder"] = Field(
        "parquet", description="parquet, hf, webdataset, openai or folder."
    )
    path: str | tuple[str, ...] = Field(
        description="Path, glob or fsspec address; dataset id for hf."
    )
    name: str | None = Field(None, description="hf: the dataset's configuration.")
    split: str = Field("train", description="hf: the split.")
    revision: str | None = Field(None, description="hf: the dataset's revision.")
    streaming: bool = Field(True, description="hf: read without a full download.")
    id: str | None = Field(None, description="Id column; default is file and row number.")
    image: str | None = Field("image", description="Image column; null for rows without.")
    video: str | None = Field(None, description="Video column; image is then null by default.")
    audio: str | None = Field(None, description="Audio column; image is then null by default.")
    keep: tuple[str, ...] = Field((), description="Columns carried into the output.")
    messages: str | None = Field(None, description="Column of OpenAI-style turns.")
    base_path: str | None = Field(None, description="Folder that relative image paths start from.")
    limit: int | None = Field(None, ge=1, description="Read only the first rows.")
    max_pixels: int = Field(100_000_000, ge=1, description="Pixels of a source image at most.")
    max_bytes: int = Field(64 << 20, ge=1, description="Encoded bytes of an image at most.")
    max_images: int = Field(64, ge=1, description="Images of one row at most.")
    max_videos: int = Field(8, ge=1, description="Videos of one row at most.")
    max_video_bytes: int = Field(256 << 20, ge=1, description="Encoded bytes of a video at most.")
    max_video_sec: float = Field(7200.0, gt=0, description="Seconds that a video lasts at most.")
    video_timeout_sec: float = Field(
        60.0, gt=0, le=100, description="Patience with decoding one video."
    )
    max_audios: int = Field(8, ge=1, description="Recordings of one row at most.")
    max_audio_bytes: int = Field(
        256 << 20, ge=1, description="Encoded bytes of a recording at most."
    )
    max_audio_sec: float = Field(1800.0, gt=0, description="Seconds a recording lasts at most.")
    remote: bool = Field(False, description="Fetch http(s) addresses of images, videos, audio.")
    remote_timeout_sec: float = Field(20.0, gt=0, description="Patience with one address.")

    @model_validator(mode="before")
    @classmethod
    def _others_without_images(cls, value: Any) -> Any:
        if isinstance(value, dict) and (value.get("video") or value.get("audio")):
            return {"image": None, **value}
        return value

    @model_validator(mode="before")
    @classmethod
    def _requests_bring_messages(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("source") == "openai":
            return {"messages": "messages", **value}
        return value


class VideoSettings(Settings):
    """Which frames of a video the model sees, and how large; null is the model's own rule."""

    fps: float | None = Field(None, gt=0, description="Frames a second; null is the model's own.")
    num_frames: int | None = Field(
        None, ge=1, description="As many frames of every video, in place of fps."
    )
    min_frames: int | None = Field(None, ge=1, description="With fps: frames of a short video.")
    max_frames: int | None = Field(None, ge=1, description="With fps: frames of a long video.")
    min_pixels: int | None = Field(None, ge=1, description="Pixels a frame has at least.")
    max_pixels: int | None = Field(None, ge=1, description="Pixels a frame is resized to at most.")

    @model_validator(mode="after")
    def _one_rule(self) -> VideoSettings:
        if self.fps is not None and self.num_frames is not None:
            raise ValueError("give either `video.fps` or `video.num_frames`, not both")
        return self


class PromptSettings(Settings):
    """One prompt, answered in the column of its name."""

    text: str = Field(description="The question; {column} is filled from the row.")
    schema_: dict[str, Any] | str | None = Field(
        None, alias="schema", description="JSON schema, or a path to one."
    )
    max_new_tokens: int | None = Field(None, ge=1, description="Limit of this prompt's answers.")

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), populate_by_name=True
    )


class GenerationSettings(Settings):
    """How answers are drawn; a key left out falls back to the checkpoint's generation_config."""

    max_new_tokens: int = Field(128, ge=1, description="Tokens of an answer at most.")
    temperature: float | None = Field(None, ge=0, description="0 always takes the likeliest token.")
    top_p: float | None = Field(
        None, gt=0, le=1, description="Draw from the likeliest tokens of this much; 1 is all."
    )
    top_k: int | None = Field(None, ge=0, description="Draw from this many tokens; 0 is all.")
    min_p: float | None = Field(
        None, ge=0, le=1, description="Drop tokens below this share of the likeliest; 0 drops none."
    )
    repetition_penalty: float | None = Field(
        None, gt=0, description="Above 1 makes seen tokens less likely; 1 changes nothing."
    )
    stop: tuple[str, ...] = Field((), description="Texts that end an answer, not part of it.")
    seed: int = Field(0, description="Makes each row's own seed, with the row's id.")
    ignore_eos: bool = Field(False, description="Write max_new_tokens tokens whatever comes.")

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class EngineSettings(Settings):
    """How the device is used; nothing here changes an answer but `deterministic` and `kv_cache`."""

    device: str = Field(
        "auto", pattern="^(auto|cpu|cuda(:[0-9]+)?)$", description="auto, cpu, cuda or cuda:N."
    )
    memory_fraction: float = Field(
        0.9, gt=0, le=1, description="Share of the card's memory to take; 1 leaves nothing over."
    )
    memory_limit_gb: float | None = Field(None, gt=0, description="Pretend the card has this much.")
    decode_slots: Positive | Literal["auto"] = Field("auto", description="Answers written at once.")
    prefill_tokens: Positive | Literal["auto"] = Field(
        "auto", description="Tokens of a prefill batch."
    )
    workers: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        "auto", description="Image decoding processes."
    )
    max_context: int | None = Field(None, ge=1, description="Prompt and answer tokens at most.")
    kv_cache: Literal["auto", "fp8"] = Field(
        "auto", description="`auto` is the model's dtype; fp8: keys and values in a byte each."
    )
    overlap: bool = Field(True, description="Prepare the next step while the device works.")
    share_prefix: bool = Field(True, description="Compute the tokens that all rows share once.")
    share_images: bool = Field(True, description="Read an image once for all of its prompts.")
    cuda_graphs: bool = Field(True, description="Decode by replaying a recorded step.")
    deterministic: bool = Field(False, description="Same text whatever the batch, bitwise.")
    threads: Positive | Literal["auto"] = Field("auto", description="CPU threads of the model.")


class LabelSettings(Settings):
    """Everything that a labeller needs; the part of a job's config that the pipeline knows."""

    model: ModelSettings
    input: InputSettings
    video: VideoSettings = Field(default_factory=VideoSettings)  # type: ignore[arg-type]
    prompts: dict[str, PromptSettings] = Field(default_factory=dict)
    system: str | None = Field(None, description="System text; null keeps the template's own.")
    generation: GenerationSettings = Field(default_factory=GenerationSettings)  # type: ignore[arg-type]
    engine: EngineSettings = Field(default_factory=EngineSettings)  # type: ignore[arg-type]

    @field_validator("prompts", mode="before")
    @classmethod
    def _short_prompts(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {k: {"text": v} if isinstance(v, str) else v for k, v in value.items()}
        return value
