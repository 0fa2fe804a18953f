"""Reads build/artwork.npz and checks that it belongs to this vocabulary."""

from pathlib import Path

import numpy as np

from demo.vocabulary import ARTISTS, NOUNS

Artwork = dict[str, np.ndarray]


def load(path: Path) -> Artwork:
    """All arrays of the archive."""
    artwork = dict(np.load(path))
    if artwork["nouns"].tolist() != [n.name for n in NOUNS] or artwork["artists"].tolist() != list(
        ARTISTS
    ):
        raise ValueError(
            f"{path} was made for other nouns or artists: make it anew with scripts/demo/artwork.py"
        )
    return artwork
