"""The small model that ships with the package, and the pictures and clips to try it on.

Only says where they are; it knows neither how they are loaded nor how they were made.
"""

from pathlib import Path

FOLDER = Path(__file__).resolve().parent
SCENES = FOLDER / "data" / "scenes.parquet"
CLIPS = FOLDER / "data" / "clips.parquet"
PHOTOGRAPHS = FOLDER / "data" / "photographs.parquet"
