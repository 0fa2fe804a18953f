"""The `deepseek-vl2` template: DeepSeek-VL2, whose system text has no frame and no default."""

from __future__ import annotations

from pipeline.templates.render import Template

TEMPLATE = Template(
    name="deepseek-vl2",
    control=(
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        "<｜▁pad▁｜>",
        "<image>",
        "<|User|>",
        "<|Assistant|>",
    ),
    start="<｜begin▁of▁sentence｜>",
    system="{content}",
    user="<|User|>: {content}\n\n",
    assistant="<|Assistant|>:{content}<｜end▁of▁sentence｜>",
    answer="<|Assistant|>:",
    after_image="\n",
    between_images="\n",
    strip=True,
    stop=("<｜end▁of▁sentence｜>",),
    spoken=("<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>", "<|grounding|>"),
)
