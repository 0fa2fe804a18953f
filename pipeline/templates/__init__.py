"""The chat templates under their public names, one table a file.

`template(name)` finds one; which family speaks which stands in `pipeline.models.registry`.
"""

from __future__ import annotations

from importlib import import_module

from pipeline.templates.render import Control, Piece, Template, render

_FILES = {
    "qwen2-vl": "qwen2_vl",
    "deepseek-vl2": "deepseek_vl2",
    "janus-pro": "janus_pro",
    "minicpmv": "minicpmv",
    "minicpmo": "minicpmo",
    "llama_3_vision": "llama_3_vision",
    "mistral": "mistral",
    "vicuna_v1.1": "vicuna",
    "chatml-llava": "chatml_llava",
    "llava_llama_3": "llava_llama_3",
    "gemma-it": "gemma_it",
    "kimi-vl": "kimi_vl",
    "smolvlm": "smolvlm",
}
NAMES = tuple(_FILES)

__all__ = ["NAMES", "Control", "Piece", "Template", "render", "template"]


def template(name: str) -> Template:
    """The table of the public name. Raises KeyError for an unknown one."""
    found: Template = import_module(f"pipeline.templates.{_FILES[name]}").TEMPLATE
    return found
