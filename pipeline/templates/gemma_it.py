"""The `gemma-it` template: Gemma 3, whose system text opens the first user turn."""

from __future__ import annotations

from pipeline.templates.render import Template

TEMPLATE = Template(
    name="gemma-it",
    control=(
        "<bos>",
        "<eos>",
        "<start_of_turn>",
        "<end_of_turn>",
        "<start_of_image>",
        "<end_of_image>",
        "<image_soft_token>",
    ),
    start="<bos>",
    user="<start_of_turn>user\n{content}<end_of_turn>\n",
    assistant="<start_of_turn>model\n{content}<end_of_turn>\n",
    answer="<start_of_turn>model\n",
    image="\n\n<start_of_image>{image}<end_of_image>\n\n",
    strip_each=True,
    alternate=True,
    stop=("<end_of_turn>", "<eos>"),
)
