"""Turns downloaded emoji and photograph packages into build/artwork.npz.

Reads unpacked npm packages (@iconify-json/…) and scikit-image's `data` folder; needs resvg-py.
It does not know scenes: a sprite is one drawing on a transparent square, in two sizes.

    python scripts/demo/artwork.py --packages DIR --photographs DIR/skimage/data
"""

import argparse
import io
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from demo.vocabulary import ARTISTS, NOUNS

FOLDERS = {"fluent": "fluent-emoji-flat"}
LARGE, SMALL = 48, 32
BACKGROUND = (280, 210)  # width, height
TRAIN_PHOTOGRAPHS = (
    "astronaut.png",
    "brick.png",
    "clock_motion.png",
    "coffee.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "retina.jpg",
    "rocket.jpg",
)
HELD_PHOTOGRAPHS = ("camera.png", "chelsea.png", "coins.png", "ihc.png")


def icon_svg(collection: dict, name: str) -> str | None:
    """The drawing called `name` as SVG text, or None when the artist has none."""
    name = collection.get("aliases", {}).get(name, {}).get("parent", name)
    icon = collection["icons"].get(name)
    if icon is None:
        return None
    width = icon.get("width", collection.get("width", 16))
    height = icon.get("height", collection.get("height", 16))
    left, top = icon.get("left", 0), icon.get("top", 0)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="256" height="256">{icon["body"]}</svg>'
    )


def rasterise(svg: str) -> Image.Image:
    """The drawing at 256 pixels, trimmed to its content and centred in a square."""
    import resvg_py

    data = resvg_py.svg_to_bytes(svg_string=svg, width=256, height=256)
    image = Image.open(io.BytesIO(bytes(data))).convert("RGBA")
    box = image.getchannel("A").point(lambda v: 255 if v > 16 else 0).getbbox()
    if box is None:
        raise ValueError("an empty drawing")
    image = image.crop(box)
    side = max(image.size)
    square = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def shrink(image: Image.Image, side: int) -> np.ndarray:
    """Premultiplied RGBA, `side` × `side`, with one transparent pixel all around."""
    inner = image.convert("RGBa").resize((side - 2, side - 2), Image.LANCZOS)
    out = np.zeros((side, side, 4), np.uint8)
    out[1:-1, 1:-1] = np.asarray(inner)
    return np.minimum(out, out[..., 3:])


def sprites(packages: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Large and small sprites [artist, noun, side, side, 4], and which of them exist."""
    large = np.zeros((len(ARTISTS), len(NOUNS), LARGE, LARGE, 4), np.uint8)
    small = np.zeros((len(ARTISTS), len(NOUNS), SMALL, SMALL, 4), np.uint8)
    there = np.zeros((len(ARTISTS), len(NOUNS)), bool)
    for a, artist in enumerate(ARTISTS):
        path = packages / FOLDERS.get(artist, artist) / "package" / "icons.json"
        collection = json.loads(path.read_text())
        for n, noun in enumerate(NOUNS):
            svg = next((s for s in (icon_svg(collection, i) for i in noun.icons) if s), None)
            if svg is None:
                print(f"{artist} has no {noun.name}")
                continue
            image = rasterise(svg)
            large[a, n], small[a, n], there[a, n] = shrink(image, LARGE), shrink(image, SMALL), True
    return large, small, there


def backgrounds(folder: Path, names: tuple[str, ...], crops: int) -> np.ndarray:
    """Crops of photographs [n, 3, height, width], the same every time."""
    rng = np.random.default_rng(7)
    width, height = BACKGROUND
    out = []
    for name in names:
        image = Image.open(folder / name).convert("RGB")
        for _ in range(crops):
            scale = rng.uniform(0.6, 1.0) * min(image.width / width, image.height / height)
            w, h = int(width * scale), int(height * scale)
            x, y = rng.integers(0, image.width - w + 1), rng.integers(0, image.height - h + 1)
            crop = image.crop((x, y, x + w, y + h)).resize(BACKGROUND, Image.LANCZOS)
            out.append(np.asarray(crop).transpose(2, 0, 1))
    return np.stack(out)


def main() -> None:
    """Writes the archive and says how large it is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--packages", type=Path, required=True)
    parser.add_argument("--photographs", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("build/artwork.npz"))
    args = parser.parse_args()
    large, small, there = sprites(args.packages)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        args.output,
        large=large,
        small=small,
        there=there,
        nouns=np.array([n.name for n in NOUNS]),
        artists=np.array(ARTISTS),
        train_backgrounds=backgrounds(args.photographs, TRAIN_PHOTOGRAPHS, 3),
        held_backgrounds=backgrounds(args.photographs, HELD_PHOTOGRAPHS, 2),
    )
    print(
        f"{args.output}: {args.output.stat().st_size / 1e6:.2f} MB, "
        f"{len(NOUNS)} nouns, {there.sum(1)} drawings"
    )


if __name__ == "__main__":
    main()
