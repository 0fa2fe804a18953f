"""Writes the test data that ships with the demonstration model, as Parquet with HF Image structs.

scenes.parquet: 200 held-out scenes (other seeds and photographs than training; one artist a scene,
every fifth by an artist never trained on). photographs.parquet: real photographs, without answers.

    python scripts/demo/tables.py --artwork build/artwork.npz --photographs DIR/skimage/data
"""

import argparse
import io
import json
import random
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from demo import artwork_file, language, render
from demo.scenes import Sampler, Scene
from demo.vocabulary import ARTISTS, HELD_ARTIST, NOUNS, TRAIN_ARTISTS

SCENES = 200
QUALITY = 92
TITLES = {
    "astronaut": "Eileen Collins (NASA; public domain)",
    "brick": "bricks (CC0Textures; CC0)",
    "camera": "a photographer (Lav Varshney; CC0)",
    "chelsea": "Chelsea the cat (Stefan van der Walt; CC0)",
    "clock_motion": "a wall clock, the camera moving (Stefan van der Walt; public domain)",
    "coffee": "a cup of coffee (Rachel Michetti; CC0)",
    "coins": "Greek coins from Pompeii (Brooklyn Museum; no known restrictions)",
    "grass": "grass (linolafett; CC0)",
    "gravel": "gravel (CC0Textures; CC0)",
    "hubble_deep_field": "the Hubble eXtreme Deep Field (NASA; public domain)",
    "retina": "a retina (Mikael Haeggstroem; CC0)",
    "rocket": "a rocket launch (SpaceX; public domain)",
}
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def encoded(image: Image.Image, quality: int) -> bytes:
    """JPEG without chroma subsampling, or PNG when that is smaller."""
    jpeg, png = io.BytesIO(), io.BytesIO()
    image.save(jpeg, "JPEG", quality=quality, subsampling=0, optimize=True)
    image.save(png, "PNG", optimize=True)
    return min(jpeg.getvalue(), png.getvalue(), key=len)


def cell(data: bytes, name: str) -> dict[str, bytes | str]:
    """A value of the image column."""
    suffix = "png" if data.startswith(b"\x89PNG") else "jpg"
    return {"bytes": data, "path": f"{name}.{suffix}"}


def scene_rows(artwork: artwork_file.Artwork, count: int) -> list[dict]:
    """The held-out scenes with all that is true of them."""
    rng = random.Random("scenes.parquet")
    renderer = render.Renderer(artwork, torch.device("cpu"), held=True)
    photographs = len(artwork["held_backgrounds"])
    out = []
    for i in range(count):
        artist = HELD_ARTIST if i % 5 == 4 else TRAIN_ARTISTS[(i - i // 5) % len(TRAIN_ARTISTS)]
        scene = Sampler(artwork, (ARTISTS.index(artist),), photographs, mix=False).scene(rng)
        wanted = language.QUESTION_KINDS[i % len(language.QUESTION_KINDS)]
        kind, question, answer = language.question(scene, rng, wanted)
        pixels = renderer(render.pack([scene], len(NOUNS)))[0].byte().permute(1, 2, 0).numpy()
        name = f"scene-{i:04d}"
        out.append(
            {
                "id": name,
                "image": cell(encoded(Image.fromarray(pixels), QUALITY), name),
                "question": question,
                **truth(scene),
                "answer_truth": answer,
                "category": kind,
                "artist": artist,
            }
        )
    return out


def truth(scene: Scene) -> dict[str, str]:
    """What is true whatever is asked."""
    return {"caption_truth": language.caption(scene), "objects_truth": language.objects(scene)}


def photograph_rows(folder: Path) -> list[dict]:
    """The real photographs, at most 480 pixels wide or high."""
    out = []
    for path in sorted(folder.iterdir()):
        if path.stem in TITLES and path.suffix in (".png", ".jpg"):
            image = Image.open(path).convert("RGB")
            image.thumbnail((480, 480), Image.Resampling.LANCZOS)
            data = encoded(image, 88)
            out.append(
                {"id": path.stem, "image": cell(data, path.stem), "title": TITLES[path.stem]}
            )
    return out


def write(rows: list[dict], path: Path) -> None:
    """One Parquet file that `datasets` reads as images."""
    fields = [pa.field(key, STRUCT if key == "image" else pa.string()) for key in rows[0]]
    features = {
        key: {"_type": "Image"} if key == "image" else {"dtype": "string", "_type": "Value"}
        for key in rows[0]
    }
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.Table.from_pylist(rows, schema=pa.schema(fields, metadata=metadata))
    pq.write_table(table, path, compression="zstd", row_group_size=50)
    print(f"{path}: {len(rows)} rows, {path.stat().st_size / 1e6:.2f} MB")


def main() -> None:
    """Writes both files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--artwork", type=Path, default=Path("build/artwork.npz"))
    parser.add_argument("--photographs", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("pipeline/demo/data"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    write(scene_rows(artwork_file.load(args.artwork), SCENES), args.output / "scenes.parquet")
    write(photograph_rows(args.photographs), args.output / "photographs.parquet")


if __name__ == "__main__":
    main()
