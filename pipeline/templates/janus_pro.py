"""The `janus-pro` template: Janus-Pro as its own code writes it, with the role tokens."""

from __future__ import annotations

from pipeline.templates.render import Template

TEMPLATE = Template(
    name="janus-pro",
    control=(
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        "<begin_of_image>",
        "<end_of_image>",
        "<image_placeholder>",
        "<|User|>",
        "<|Assistant|>",
    ),
    start="<｜begin▁of▁sentence｜>",
    system="{content}\n\n",
    user="<|User|>: {content}\n\n",
    assistant="<|Assistant|>: {content}<｜end▁of▁sentence｜>",
    answer="<|Assistant|>:",
    default_system=(
        "You are a helpful language and vision assistant. You are able to understand the visual"
        " content that the user provides, and assist the user with a variety of tasks using natural"
        " language."
    ),
    image="<begin_of_image>{image}<end_of_image>",
    after_image="\n",
    between_images="\n",
    blank_system=False,
    strip=True,
    stop=("<｜end▁of▁sentence｜>",),
)
