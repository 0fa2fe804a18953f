"""The benchmark's five workloads: real photographs or drawn pages, questions, answer lengths.

A workload is made in memory from a seed; another seed gives images that no other seed has, so
nothing is cached between repetitions. Knows no engine. Imports no torch.
"""

from __future__ import annotations

import importlib.util
import io
import os
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

from PIL import Image, ImageDraw, ImageEnhance, ImageFont

NAMES = ("caption", "mixed", "vqa", "ocr", "prefix")
PLAIN_SYSTEM = "You are a helpful assistant."
DESCRIBE = "Describe this image in detail."
PHOTO = (1024, 768)
PAGE = (1275, 1650)
THUMBNAIL = (256, 192)
SHARED_THUMBNAIL = (448, 336)  # tokens enough that steps read them once for all its questions
NUM_SCENES = 32  # drawn instead of photographs where none is installed
SCRAPED = ((512, 384), (640, 480), (800, 600), (768, 1024), (1024, 768), (1280, 960))
QUESTIONS = {
    "subject": "What is the main subject?",
    "people": "How many people are visible?",
    "colours": "What colours dominate?",
    "place": "Is it indoors or outdoors?",
    "time": "What time of day is it?",
    "text": "Is there any text? Transcribe it.",
    "background": "What is in the background?",
    "sharpness": "Rate the photo's sharpness from 1 to 5.",
}
WORDS = (
    "the of light river market seven paper ladder under garden winter measure cloud signal harbour "
    "table second woman early"
).split()


@dataclass(frozen=True)
class Workload:
    """Encoded images, the prompts asked of each, and each image's answer lengths."""

    name: str
    images: tuple[bytes, ...]
    prompts: dict[str, str]
    output_tokens: tuple[int, ...]  # of every answer about image i
    system: str = PLAIN_SYSTEM
    sizes: tuple[tuple[int, int], ...] = ()
    kind: str = "photographs"
    seed: int = 0

    @property
    def num_answers(self) -> int:
        return len(self.images) * len(self.prompts)


def make(name: str, num_answers: int, seed: int) -> Workload:
    """Make the workload `name` with about that many answers (a multiple of its prompts)."""
    rng = random.Random(seed)
    if name == "ocr":
        return _pages(num_answers, seed, rng)
    if name == "vqa":
        num_images = max(1, num_answers // len(QUESTIONS))
        return _photos(name, [PHOTO] * num_images, [16] * num_images, seed, prompts=QUESTIONS)
    if name == "mixed":
        sizes = [rng.choice(SCRAPED) for _ in range(num_answers)]
        lengths = [_length(rng.lognormvariate(4.6, 0.6)) for _ in range(num_answers)]
        return _photos(name, sizes, lengths, seed)
    if name == "prefix":
        prompts = {"answer": "Which rules apply?"}
        sizes, lengths = [PHOTO] * num_answers, [64] * num_answers
        return _photos(name, sizes, lengths, seed, prompts=prompts, system=_rules())
    if name == "caption":
        return _photos(name, [PHOTO] * num_answers, [128] * num_answers, seed)
    raise ValueError(f"unknown workload {name!r}; there are {', '.join(NAMES)}")


def thumbnails(load: Workload, num_answers: int) -> Workload:
    """A warm-up for a workload: small images, and answers that end one after another.

    As many lanes as the workload fills run at first, and fewer and fewer then, so that every
    count of lanes has been seen; takes seconds.
    """
    num_images = max(1, num_answers // len(load.prompts))
    size = SHARED_THUMBNAIL if len(load.prompts) > 1 else THUMBNAIL
    small = _photos("warmup", [size] * num_images, range(num_images), 99)
    return replace(
        load,
        images=small.images,
        sizes=small.sizes,
        output_tokens=tuple(2 + i % 32 for i in range(num_images)),
    )


def asked(text: str, reps: int) -> list[tuple[str, int]]:
    """`caption,ocr:1` as [("caption", reps), ("ocr", 1)]."""
    parts = [part.partition(":") for part in text.split(",")]
    return [(name, int(own) if own else reps) for name, _, own in parts]


def repetition_seed(seed: int, number: int) -> int:
    """The seed of repetition `number`, counted from 0; -1 is the warm-up."""
    return seed + 977 * (number + 1)


def _length(value: float) -> int:
    """An answer's length between 16 and 400."""
    return max(16, min(400, int(value)))


def _rules() -> str:
    """2,083 tokens of instructions that every row shares."""
    rng = random.Random(5)
    rules = (f"Rule {i}: {' '.join(_words(rng, 14))}." for i in range(1, 105))
    return "You label photographs by these rules. " + " ".join(rules)


def _words(rng: random.Random, count: int) -> list[str]:
    return [rng.choice(WORDS) for _ in range(count)]


def _photos(
    name: str,
    sizes: Sequence[tuple[int, int]],
    lengths: Sequence[int],
    seed: int,
    prompts: dict[str, str] | None = None,
    system: str = PLAIN_SYSTEM,
) -> Workload:
    jobs = [(i, size, seed) for i, size in enumerate(sizes)]
    return Workload(
        name=name,
        images=tuple(_in_processes(_photo, jobs)),
        prompts=dict(prompts or {"answer": DESCRIBE}),
        output_tokens=tuple(lengths),
        system=system,
        sizes=tuple(sizes),
        kind="photographs" if photograph_files() else "drawn scenes",
        seed=seed,
    )


def _pages(num_answers: int, seed: int, rng: random.Random) -> Workload:
    seeds = range(seed * 100_000, seed * 100_000 + num_answers)
    return Workload(
        name="ocr",
        images=tuple(_in_processes(_page, list(seeds))),
        prompts={"answer": "Transcribe the page."},
        output_tokens=tuple(rng.randint(600, 1200) for _ in range(num_answers)),
        sizes=(PAGE,) * num_answers,
        kind="drawn pages",
        seed=seed,
    )


def _in_processes(make_one, jobs: list) -> Iterator[bytes]:
    if len(jobs) < 16:
        yield from map(make_one, jobs)
        return
    # NOTE: spawned, since a forked child of a process that uses CUDA can hang.
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        yield from pool.map(make_one, jobs, chunksize=8)


@lru_cache
def photograph_files() -> tuple[Path, ...]:
    """Photographs that scikit-image and scikit-learn ship, where these are installed."""
    found: list[Path] = []
    for package in ("skimage", "sklearn"):
        spec = importlib.util.find_spec(package)
        if spec and spec.origin:
            files = sorted(Path(spec.origin).parent.rglob("*"))
            found += [f for f in files if f.suffix.lower() in {".jpg", ".jpeg", ".png"}]
    return tuple(f for f in found if _is_large(f))


def _is_large(file: Path) -> bool:
    try:
        with Image.open(file) as image:
            return min(image.size) >= 300
    except OSError:
        return False


def _source(number: int) -> Image.Image:
    files = photograph_files()
    return _picture(number % (len(files) or NUM_SCENES))


@lru_cache(maxsize=64)
def _picture(number: int) -> Image.Image:
    files = photograph_files()
    return Image.open(files[number]).convert("RGB") if files else _scene(number)


def _scene(number: int) -> Image.Image:
    """A stand-in for a photograph where none is installed: soft noise and some shapes."""
    rng = random.Random(number)
    noise = Image.effect_noise((160, 120), 90).resize((1280, 960), Image.Resampling.BICUBIC)
    bands = [ImageEnhance.Brightness(noise).enhance(rng.random()) for _ in "rgb"]
    image = Image.merge("RGB", bands)
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        x, y, r = rng.randrange(1280), rng.randrange(960), rng.randrange(30, 200)
        colour = tuple(rng.randrange(256) for _ in "rgb")
        draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    return image


def _photo(job: tuple[int, tuple[int, int], int]) -> bytes:
    """A JPEG of that size: a crop of a source picture, at a place that the seed draws."""
    number, size, seed = job
    rng = random.Random(seed * 1_000_003 + number)
    source = _source(number)
    share = rng.uniform(0.55, 1)
    width, height = int(source.width * share), int(source.height * share)
    x, y = rng.randint(0, source.width - width), rng.randint(0, source.height - height)
    crop = source.crop((x, y, x + width, y + height)).resize(size, Image.Resampling.BICUBIC)
    return _jpeg(crop, quality=92)


def _page(seed: int) -> bytes:
    """A JPEG of a page of drawn words."""
    rng = random.Random(seed)
    page = Image.new("RGB", PAGE, (250, 249, 245))
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(24)
    for y in range(100, PAGE[1] - 100, 36):
        line = " ".join(_words(rng, rng.randint(6, 13)))
        draw.text((100, y), line, fill=(20, 20, 25), font=font)
    return _jpeg(page, quality=85)


def _jpeg(image: Image.Image, quality: int) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return out.getvalue()
