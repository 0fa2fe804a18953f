"""The `llama_3_vision` template: Llama 3.2 Vision, which refuses a system text beside images.

A prompt without images opens with a system turn that names a date. The official template writes the
day's, or this one where it knows none; an answer must not depend on the day, so it is always this.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.rows import Turn
from pipeline.templates.render import Template

DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"

TEMPLATE = Template(
    name="llama_3_vision",
    control=(
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|image|>",
    ),
    start="<|begin_of_text|>",
    system="<|start_header_id|>system<|end_header_id|>\n\n{content}<|eot_id|>",
    user="<|start_header_id|>user<|end_header_id|>\n\n{content}<|eot_id|>",
    assistant="<|start_header_id|>assistant<|end_header_id|>\n\n{content}<|eot_id|>",
    answer="<|start_header_id|>assistant<|end_header_id|>\n\n",
    system_with_images=False,
    stop=("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"),
)


def with_dates(turns: Sequence[Turn]) -> Sequence[Turn]:
    """`turns` as the official template takes them: dated without images, else without a blank
    system turn.
    """
    system = turns[0].parts if turns and turns[0].role == "system" else ()
    rest = turns[1:] if system else turns
    text = "".join(part for part in system if isinstance(part, str)).strip()
    if not any(isinstance(part, int) for turn in turns for part in turn.parts):
        return [Turn("system", (DATES + text,)), *rest]
    return turns if text else rest
