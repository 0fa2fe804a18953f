"""The `vicuna_v1.1` template: LLaVA 1.5 and 1.6."""

from __future__ import annotations

from pipeline.templates.render import Template

TEMPLATE = Template(
    name="vicuna_v1.1",
    control=("<s>", "</s>", "<image>"),
    start="<s>",
    system="{content} ",
    user="USER: {content} ",
    assistant="ASSISTANT: {content}</s>",
    answer="ASSISTANT:",
    default_system=(
        "A chat between a curious user and an artificial intelligence assistant. The assistant"
        " gives helpful, detailed, and polite answers to the user's questions."
    ),
    after_image="\n",
    between_images="\n",
    stop=("</s>",),
)
