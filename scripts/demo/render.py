"""Draws batches of scenes with torch, on any device: uint8 pixels, and the processor's patches.

The order of the patches and the normalisation are those of Qwen2VLImageProcessor for sizes that
are multiples of 28 (it does not resize them). It knows the shapes of sprites, not what they show.
"""

import numpy as np
import torch
import torch.nn.functional as F

from demo.scenes import Scene
from demo.vocabulary import HEIGHT, MOST_OBJECTS, WIDTH

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
PATCH, MERGE, TEMPORAL = 14, 2, 2
SPRITE_SHARE = 0.84  # of the disc's diameter
_EDGE = 32  # half the side of the window an object is drawn in
# JPEG's example quantisation tables (ITU T.81, K.1 and K.2), for brightness and for colour.
_LUMA = """
16 11 10 16 24 40 51 61 12 12 14 19 26 58 60 55 14 13 16 24 40 57 69 56 14 17 22 29
51 87 80 62 18 22 37 56 68 109 103 77 24 35 55 64 81 104 113 92 49 64 78 87 103 121
120 101 72 92 95 98 112 100 103 99
"""
_CHROMA = """
17 18 24 47 99 99 99 99 18 21 26 66 99 99 99 99 24 26 56 99 99 99 99 99 47 66 99 99
99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99
99 99 99 99 99 99 99 99
"""


def pack(scenes: list[Scene], nouns: int) -> dict[str, np.ndarray]:
    """The scenes as arrays: everything `Renderer` needs."""
    b = len(scenes)
    out = {
        "sprite": np.full((b, MOST_OBJECTS), -1, np.int32),
        "large": np.zeros((b, MOST_OBJECTS), bool),
        "geometry": np.zeros((b, MOST_OBJECTS, 5), np.float32),  # x, y, diameter, angle, ±1
        "disc": np.zeros((b, MOST_OBJECTS, 3), np.float32),
        "photograph": np.array([s.photograph for s in scenes], np.int32),
        "crop": np.array(
            [(*s.crop, -1.0 if s.mirrored else 1.0, s.wash) for s in scenes], np.float32
        ),
        "plain": np.array([s.plain for s in scenes], np.float32),
    }
    for i, scene in enumerate(scenes):
        for j, t in enumerate(scene.objects):
            out["sprite"][i, j] = t.artist * nouns + t.noun
            out["large"][i, j] = t.large
            out["geometry"][i, j] = (
                t.x,
                t.y,
                t.diameter,
                t.angle * np.pi / 180,
                -1.0 if t.flip else 1.0,
            )
            out["disc"][i, j] = t.disc
    return out


def upload(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """On the device, without waiting for the work that is queued there."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class Renderer:
    """Holds sprites and photographs on a device and composes scenes from them."""

    def __init__(self, artwork: dict[str, np.ndarray], device: torch.device, held: bool = False):
        """`held`: with the photographs that training never sees."""
        self.device = device
        # One table: the large drawings, then the small ones in the corner of such squares.
        large, small = artwork["large"], np.zeros_like(artwork["large"])
        self.side, self.small_side = large.shape[2], artwork["small"].shape[2]
        small[:, :, : self.small_side, : self.small_side] = artwork["small"]
        table = torch.from_numpy(np.stack([large, small])).flatten(0, 2).permute(0, 3, 1, 2)
        self.sprites, self.count = table.contiguous().to(device), len(table) // 2
        photographs = artwork["held_backgrounds" if held else "train_backgrounds"]
        self.photographs = torch.from_numpy(photographs).to(device)
        rows = torch.arange(HEIGHT, device=device, dtype=torch.float32) + 0.5
        columns = torch.arange(WIDTH, device=device, dtype=torch.float32) + 0.5
        self.y, self.x = torch.meshgrid(rows, columns, indexing="ij")

    def __call__(self, packed: dict[str, np.ndarray]) -> torch.Tensor:
        """Pixels [b, 3, height, width], 0…255, whole numbers held as float32."""
        data = {key: upload(value, self.device) for key, value in packed.items()}
        image = F.pad(self._background(data), (_EDGE, _EDGE, _EDGE, _EDGE))
        for slot in range(MOST_OBJECTS):
            self._paste(image, data, slot)
        return image[:, :, _EDGE:-_EDGE, _EDGE:-_EDGE].clamp(0, 255).round()

    def _background(self, data: dict[str, torch.Tensor]) -> torch.Tensor:
        size, left, top, mirror, wash = data["crop"].unbind(1)
        u = (self.x / WIDTH * 2 - 1)[None] * (size * mirror)[:, None, None]
        v = (self.y / HEIGHT * 2 - 1)[None] * size[:, None, None]
        u = u + ((left * 2 - 1) * (1 - size))[:, None, None]
        v = v + ((top * 2 - 1) * (1 - size))[:, None, None]
        chosen = self.photographs[data["photograph"].clamp(min=0).long()].float()
        grid = torch.stack([u, v], -1)
        photo = F.grid_sample(
            chosen, grid, mode="bilinear", padding_mode="border", align_corners=False
        )
        mean = photo.mean((2, 3), keepdim=True)
        photo = photo + (mean - photo) * wash[:, None, None, None]
        ramp = ((self.x + self.y) / (WIDTH + HEIGHT))[None, None]
        first, second = data["plain"][:, 0, :, None, None], data["plain"][:, 1, :, None, None]
        plain = first + (second - first) * ramp
        return torch.where((data["photograph"] >= 0)[:, None, None, None], photo, plain)

    def _paste(self, image: torch.Tensor, data: dict[str, torch.Tensor], slot: int) -> None:
        """Draws one object of every scene in place, within a square window around it."""
        x, y, diameter, angle, flip = (
            v[:, None, None] for v in data["geometry"][:, slot].unbind(1)
        )
        sprite, is_small = data["sprite"][:, slot].long(), ~data["large"][:, slot]
        there = (sprite >= 0)[:, None, None]
        step = torch.arange(2 * _EDGE, device=self.device)
        left, top = x.floor().long(), y.floor().long()  # in the padded image: the window's corner
        rows, columns = top + step[None, :, None], left + step[None, None, :]
        dx, dy = columns - _EDGE + 0.5 - x, rows - _EDGE + 0.5 - y
        inside = ((diameter / 2 - (dx * dx + dy * dy).sqrt() + 0.5).clamp(0, 1) * there)[:, None]
        rim = ((dx * dx + dy * dy).sqrt() - diameter / 2 + 2.5).clamp(0, 1)[:, None]
        flat = image.flatten(2)
        index = (rows * image.shape[3] + columns).flatten(1)[:, None].expand(-1, 3, -1)
        window = flat.gather(2, index).view(-1, 3, 2 * _EDGE, 2 * _EDGE)
        disc = data["disc"][:, slot, :, None, None]
        edge = torch.where(disc.mean(1, keepdim=True) < 60, disc + 70, disc * 0.7)
        window = window + (disc + (edge - disc) * rim - window) * inside
        half = (diameter * SPRITE_SHARE / 2).clamp(min=1)
        cos, sin = angle.cos(), angle.sin()
        grid = torch.stack([(dx * cos + dy * sin) * flip / half, (dy * cos - dx * sin) / half], -1)
        share = self.small_side / self.side
        grid = torch.where(is_small[:, None, None, None], (grid + 1) * share - 1, grid)
        drawings = self.sprites[sprite.clamp(min=0) + is_small * self.count].float()
        drawn = F.grid_sample(
            drawings, grid, mode="bilinear", padding_mode="zeros", align_corners=False
        )
        drawn = drawn * there[:, None]
        window = window * (1 - drawn[:, 3:] / 255) + drawn[:, :3]
        flat.scatter_(2, index, window.flatten(2))


def jpeg(image: torch.Tensor, quality: torch.Tensor) -> torch.Tensor:
    """What saving as JPEG (no chroma subsampling) at `quality` [b], 50…100, does to the pixels."""
    b, _, h, w = image.shape
    r, g, bl = image.unbind(1)
    luma = 0.299 * r + 0.587 * g + 0.114 * bl
    planes = torch.stack([luma - 128, (bl - luma) * 0.564, (r - luma) * 0.713], 1)
    k = torch.arange(8, device=image.device, dtype=torch.float32)
    basis = torch.cos((2 * k[None] + 1) * k[:, None] * torch.pi / 16) * 0.5
    basis[0] *= 0.5**0.5
    blocks = planes.view(b, 3, h // 8, 8, w // 8, 8).transpose(3, 4)
    numbers = [[int(v) for v in table.split()] for table in (_LUMA, _CHROMA, _CHROMA)]
    tables = torch.tensor(numbers, device=image.device, dtype=torch.float32).view(3, 8, 8)
    scale = ((200 - 2 * quality) / 100)[:, None, None, None]
    steps = (tables * scale + 0.5).floor().clamp(1, 255)[:, :, None, None]
    coefficients = basis @ blocks @ basis.T
    coefficients = (coefficients / steps).round() * steps
    planes = (basis.T @ coefficients @ basis).transpose(3, 4).reshape(b, 3, h, w)
    luma, cb, cr = planes[:, 0] + 128, planes[:, 1], planes[:, 2]
    r, bl = luma + cr / 0.713, luma + cb / 0.564
    g = (luma - 0.299 * r - 0.114 * bl) / 0.587
    return torch.stack([r, g, bl], 1).clamp(0, 255).round()


def disturb(image: torch.Tensor) -> torch.Tensor:
    """For training: half of the batch through JPEG, a quarter with noise and other brightness."""
    half, quarter = image.shape[0] // 2, image.shape[0] // 4
    compressed = jpeg(image[:half], 85 + 15 * torch.rand(half, device=image.device))
    rest = image[half : image.shape[0] - quarter]
    last = image[image.shape[0] - quarter :]
    contrast, brightness = torch.rand(2, quarter, 1, 1, 1, device=image.device)
    last = (
        (last - 128) * (0.9 + 0.2 * contrast) + 118 + 20 * brightness + torch.randn_like(last) * 4
    )
    return torch.cat([compressed, rest, last.clamp(0, 255).round()])


def patches(image: torch.Tensor) -> torch.Tensor:
    """[b, patches, 3·2·14·14] in the order of Qwen2VLImageProcessor."""
    b, _, h, w = image.shape
    mean = torch.tensor(MEAN, device=image.device).view(1, 3, 1, 1)
    std = torch.tensor(STD, device=image.device).view(1, 3, 1, 1)
    x = (image / 255 - mean) / std
    rows, columns = h // (PATCH * MERGE), w // (PATCH * MERGE)
    x = x.view(b, 3, rows, MERGE, PATCH, columns, MERGE, PATCH).permute(0, 2, 5, 3, 6, 1, 4, 7)
    x = x.reshape(b, rows * columns * MERGE * MERGE, 3, 1, PATCH * PATCH)
    return x.expand(-1, -1, -1, TEMPORAL, -1).reshape(b, rows * columns * MERGE * MERGE, -1)
