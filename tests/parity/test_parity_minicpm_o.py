"""MiniCPM-o 2.6 gives its official code's ids, logits and greedy tokens, with sound and without.

The official numbers are recorded (`tests/helpers/recorded.py`). CPU, float32.
"""

from __future__ import annotations

import base64
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file
from transformers import WhisperFeatureExtractor

from jobs.config import load_config
from pipeline.audio import probe, read_samples
from pipeline.errors import RowError, UserError
from pipeline.estimate import estimate
from pipeline.models.audio.mel import log_mel, mel_filters, num_frames
from pipeline.models.audio.pieces import pieces
from pipeline.models.base import Model
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.families.minicpm import spec as minicpm
from pipeline.models.families.minicpm_o import spec
from pipeline.models.families.minicpm_o.model import audio_config
from pipeline.models.registry import family_for
from pipeline.rows import ImageLayout, Turn, VideoInfo
from pipeline.settings import LabelSettings, ModelSettings, VideoSettings
from pipeline.tokenizer import Tokenizer
from tests.helpers.checkpoint_copies import copy_with_tensor, set_keys
from tests.helpers.job_folder import ROOT, JobFolder
from tests.helpers.minicpm_checkpoint import write_minicpm_o, write_minicpm_v
from tests.helpers.parity import Prompt, difference, open_ours, our_logits, our_tokens
from tests.helpers.recorded import recording
from tests.parity.minicpm_cases import SOUND_CASES, Case, Picture, Wave, pixels_of, samples_of

RECORDED = recording("minicpm_o")
OWN_LABELLER = {"VLM_BATCH_LABELLER": "pipeline.labeller:Labeller"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_minicpm_o(tmp_path_factory.mktemp("minicpm_o"))


@pytest.fixture(scope="module")
def ours(folder: Path) -> Model:
    return open_ours(folder, spec.build)


def bytes_of(samples: np.ndarray) -> np.ndarray:
    return samples.view(np.uint8).reshape(-1, 4)


def prompt_of(case: Case, folder: Path, family: Any) -> Prompt:
    turns: list[Turn] = []
    media: list[np.ndarray] = []
    layouts: list[ImageLayout] = []
    for role, parts in case.turns:
        numbered: list[str | int] = []
        for part in parts:
            numbered.append(part if isinstance(part, str) else len(media))
            if isinstance(part, Picture):
                media.append(pixels_of(part))
                layouts.append(family.layout(part.width, part.height))
            elif isinstance(part, Wave):
                media.append(bytes_of(samples_of(part)))
                layouts.append(family.audio_layout(part.num_samples))
        turns.append(Turn(role, tuple(numbered)))
    tokenizer = Tokenizer(Checkpoint.open(ModelSettings(id=str(folder))), family.control)
    tokens, starts = family.tokenize(turns, layouts, tokenizer)
    return Prompt(tokens, tuple(media), tuple(layouts), starts)


@pytest.mark.parametrize("name", SOUND_CASES)
@torch.inference_mode()
def test_official_numbers(name: str, folder: Path, ours: Any) -> None:
    prompt = prompt_of(SOUND_CASES[name], folder, ours.family)
    assert prompt.tokens.tolist() == RECORDED.facts[name]["ids"]
    theirs = torch.from_numpy(RECORDED.tensors[name])
    assert difference(our_logits(ours, prompt)[::21, ::3], theirs) < 1e-4
    assert our_tokens(ours, prompt, 8) == RECORDED.facts[name]["tokens"]


@pytest.mark.parametrize("num_samples", [700, 16_000, 16_001, 479_900, 480_000])
def test_spectrogram(num_samples: int) -> None:
    """To 1e-4 in the logarithm's units: the same transform over a shorter run of zeros."""
    wave = samples_of(Wave(num_samples, 9))
    official = WhisperFeatureExtractor()
    expected = official(wave, sampling_rate=16_000, return_tensors="pt")["input_features"][0]
    frames = num_frames(num_samples)
    found = log_mel(torch.from_numpy(wave)[None], mel_filters(80), frames)[0]
    torch.testing.assert_close(found, expected[:, :frames], rtol=0, atol=1e-4)


def test_filters() -> None:
    theirs = torch.from_numpy(WhisperFeatureExtractor().mel_filters.T).float()
    torch.testing.assert_close(mel_filters(80), theirs, rtol=0, atol=1e-7)


@torch.inference_mode()
def test_a_batch_is_its_sounds(ours: Any) -> None:
    sizes = [9000, 480_000, 9000, 33_333, 500_000, 481_000, 9000]
    waves = [torch.from_numpy(samples_of(Wave(n, i))) for i, n in enumerate(sizes)]
    together = ours.hearing(waves)
    alone = [ours.hearing([wave]) for wave in waves]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=2e-5)


def test_tokens_are_the_pieces(ours: Any) -> None:
    """The header's count is the sum over pieces, whatever the last one's length."""
    rng = np.random.default_rng(0)
    for samples in [*range(479_000, 484_000, 53), *rng.integers(500, 3_000_000, 300).tolist()]:
        layout = ours.family.audio_layout(samples)
        assert layout.grid[2] == sum(p.num_tokens for p in pieces([samples], 50, 2))
        assert len(ours.family.image_tokens(layout)) == layout.num_tokens


def test_next_to_no_sound_is_refused(ours: Any) -> None:
    with pytest.raises(RowError, match="too few") as caught:
        ours.family.audio_layout(320)
    assert caught.value.code == "empty_audio"


def test_neither_takes_the_other(folder: Path) -> None:
    config = Checkpoint.open(ModelSettings(id=str(folder))).config
    assert spec.matches(config)
    assert not minicpm.matches(config)
    assert not spec.matches(config | {"version": 4.5})


def test_another_template_is_refused(folder: Path) -> None:
    settings = ModelSettings(id=str(folder), chat_template="minicpmv")
    with pytest.raises(UserError, match="'minicpmo'"):
        family_for(Checkpoint.open(settings), settings)


def _wav(num_samples: int, seed: int, kind: str = "WAV") -> bytes:
    out = io.BytesIO()
    soundfile.write(out, samples_of(Wave(num_samples, seed)), 16_000, format=kind)
    return out.getvalue()


def _png(width: int, height: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels_of(Picture(width, height))).save(out, "PNG")
    return out.getvalue()


def _said(folder: Path, ours: Any, data: bytes, text: str) -> str:
    """The answer to one recording by itself, outside the engine."""
    samples = read_samples(data, probe(data, 60.0))
    layout = ours.family.audio_layout(len(samples))
    tokenizer = Tokenizer(Checkpoint.open(ModelSettings(id=str(folder))), ours.family.control)
    tokens, starts = ours.family.tokenize([Turn("user", (0, text))], [layout], tokenizer)
    found = our_tokens(ours, Prompt(tokens, (bytes_of(samples),), (layout,), starts), 5)
    ends = [i for i, token in enumerate(found) if token in ours.family.eos_token_ids]
    return tokenizer.decode(found[: ends[0]] if ends else found)


@torch.inference_mode()
def test_the_shipped_config_hears(folder: Path, ours: Any, tmp_path: Path) -> None:
    """Bytes and paths of three formats, a broken one and none at all."""
    (tmp_path / "there.flac").write_bytes(_wav(20_000, 2, "FLAC"))
    sounds: list[Any] = [
        {"bytes": _wav(9000, 1), "path": None},
        {"bytes": None, "path": "there.flac"},
        {"bytes": _wav(30_000, 3, "MP3"), "path": None},
        {"bytes": _wav(9000, 1)[:5000], "path": None},
        None,
    ]
    pq.write_table(pa.table({"audio": sounds}), tmp_path / "in.parquet")
    job = JobFolder(tmp_path, 5, ROOT / "configs/audio.yaml", tmp_path / "out")
    places = {"MODEL": folder, "AUDIO": tmp_path / "in.parquet", "OUT": tmp_path / "out"}
    changes = ["generation.max_new_tokens=5", f"input.base_path={tmp_path}", "engine.workers=1"]
    ended = job.run(
        *(part for change in changes for part in ("--set", change)),
        env=OWN_LABELLER | {name: str(place) for name, place in places.items()},
    )
    assert ended.returncode == 0, ended.stderr
    rows = job.content()
    asked = load_config(job.config).prompts["said"].text
    assert [row["said"] is not None for row in rows] == [True, True, True, False, False]
    for number in (0, 2):
        assert rows[number]["said"] == _said(folder, ours, sounds[number]["bytes"], asked)
    assert "truncated_audio" in str(rows[3])
    assert "missing_audio" in str(rows[4])


def test_run_with_messages(folder: Path, tmp_path: Path) -> None:
    """OpenAI's parts of sound, one beside a picture; a second recording is too many."""
    data = base64.b64encode(_wav(9000, 1)).decode()
    picture = "data:image/png;base64," + base64.b64encode(_png(90, 60)).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": picture}},
        {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}},
    ]
    talks = [
        [{"role": "user", "content": [*parts, {"type": "text", "text": "What is said?"}]}],
        [{"role": "user", "content": [parts[1], parts[1], {"type": "text", "text": "And?"}]}],
    ]
    pq.write_table(pa.table({"talk": [json.dumps(t) for t in talks]}), tmp_path / "in.parquet")
    config = {
        "model": {"id": str(folder)},
        "input": {"path": str(tmp_path / "in.parquet"), "messages": "talk", "image": None},
        "generation": {"max_new_tokens": 5},
        "engine": {"device": "cpu", "workers": 1},
        "output": {"path": str(tmp_path / "out")},
    }
    (tmp_path / "job.yaml").write_text(json.dumps(config))
    job = JobFolder(tmp_path, 2, tmp_path / "job.yaml", tmp_path / "out")
    ended = job.run(env=OWN_LABELLER)
    assert ended.returncode == 0, ended.stderr
    one, two = job.content()
    assert one["answer"] is not None
    assert "too_many_audios" in str(two)


@pytest.mark.parametrize(
    ("name", "shape", "named"),
    [
        ("apm.conv2.bias", None, "'apm.conv2.bias'"),
        ("apm.more", (2,), "'apm.more'"),
        ("apm.layers.0.fc1.bias", (3,), r"'apm.layers.0.fc1.bias' has shape \(3,\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    folder: Path, tmp_path: Path, name: str, shape: Any, named: str
) -> None:
    broken = copy_with_tensor(folder, tmp_path / "broken", name, shape)
    with pytest.raises(UserError, match=named):
        open_ours(broken, spec.build)


def test_a_model_that_does_not_hear_is_refused_before_any_work(tmp_path: Path) -> None:
    pq.write_table(pa.table({"said": [_wav(900, 0)]}), tmp_path / "a.parquet")
    settings = LabelSettings(
        model={"id": str(write_minicpm_v(tmp_path / "model"))},
        input={"path": str(tmp_path / "a.parquet"), "audio": "said"},
        prompts={"said": {"text": "What?"}},
    )
    with pytest.raises(UserError, match="takes no audio"):
        estimate(settings)


def test_plan_counts_recordings(folder: Path, tmp_path: Path) -> None:
    pq.write_table(pa.table({"said": [_wav(16_000, 0), b"nothing"]}), tmp_path / "a.parquet")
    settings = LabelSettings(
        model={"id": str(folder)},
        input={"path": str(tmp_path / "a.parquet"), "audio": "said"},
        prompts={"said": {"text": "What?"}},
    )
    plan = estimate(settings)
    assert plan.audio_tokens == 27  # one second between its markers
    assert plan.image_tokens == 0
    assert plan.failed == {"not_audio": 1}


@torch.inference_mode()
def test_a_video_beside_its_sound(folder: Path, ours: Any) -> None:
    """Frames, then the recording; the prompt is a spoken one and no frame has a number."""
    family = ours.family
    clip = family.video_layout(VideoInfo(90, 60, 30, 10.0), VideoSettings(num_frames=3))
    layouts = [clip, family.audio_layout(9000)]
    tokenizer = Tokenizer(Checkpoint.open(ModelSettings(id=str(folder))), family.control)
    tokens, starts = family.tokenize([Turn("user", (0, 1, "What?"))], layouts, tokenizer)
    text = tokenizer.decode(tokens.tolist(), skip_special=False)
    assert text.endswith("<|im_start|>assistant\n<|spk_bos|><|spk|><|spk_eos|><|tts_bos|>")
    assert "<image_id>" not in text
    assert starts[1] == starts[0] + clip.num_tokens + 1
    frames = np.zeros((3, clip.height, clip.width, 3), np.uint8)
    media = [torch.from_numpy(frames), torch.from_numpy(bytes_of(samples_of(Wave(9000))))]
    both = ours.encode_images(media, layouts)
    alone = [ours.encode_images([m], [n]) for m, n in zip(media, layouts, strict=True)]
    torch.testing.assert_close(both, torch.cat(alone))


def test_without_its_encoder_of_sounds(folder: Path, ours: Any, tmp_path: Path) -> None:
    """Neither tensors nor recordings of it; pictures stay."""
    for name in ("config.json", "preprocessor_config.json", "tokenizer.json"):
        shutil.copyfile(folder / name, tmp_path / name)
    kept = load_file(folder / "model.safetensors")
    kept = {n: t for n, t in kept.items() if not n.startswith(("apm.", "audio_", "tts."))}
    save_file(kept, tmp_path / "model.safetensors")
    set_keys(tmp_path, "config.json", init_audio=False, init_tts=False)
    model: Any = open_ours(tmp_path, spec.build)
    assert model.family.takes == {"image", "video"}
    with pytest.raises(RowError, match="no audio"):
        model.family.audio_layout(16_000)
    image, layout = torch.zeros(60, 90, 3, dtype=torch.uint8), ours.family.layout(90, 60)
    expected = ours.encode_images([image], [layout])
    torch.testing.assert_close(model.encode_images([image], [layout]), expected)


def test_how_sounds_are_cut() -> None:
    assert audio_config({"audio_chunk_length": 0.5}).chunk == 25
    assert audio_config({"audio_chunk_length": -1}).chunk == 1500  # all at once
    assert audio_config({}).chunk == 50


def test_other_pools_are_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    set_keys(tmp_path / "copy", "config.json", audio_pool_step=5)
    settings = ModelSettings(id=str(tmp_path / "copy"))
    with pytest.raises(UserError, match="audio_pool_step 2"):
        spec.build(Checkpoint.open(settings), settings)
