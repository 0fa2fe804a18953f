"""The `llava_llama_3` template: LLaVA-NeXT on Llama 3."""

from __future__ import annotations

from pipeline.templates.render import Template

TEMPLATE = Template(
    name="llava_llama_3",
    control=(
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<image>",
    ),
    start="<|begin_of_text|>",
    system="<|start_header_id|>system<|end_header_id|>\n\n{content}<|eot_id|>",
    user="<|start_header_id|>user<|end_header_id|>\n\n{content}<|eot_id|>",
    assistant="<|start_header_id|>assistant<|end_header_id|>\n\n{content}<|eot_id|>",
    answer="<|start_header_id|>assistant<|end_header_id|>\n\n",
    default_system=(
        "You are a helpful language and vision assistant. You are able to understand the visual"
        " content that the user provides, and assist the user with a variety of tasks using"
        " natural language."
    ),
    after_image="\n",
    between_images="\n",
    strip=True,
    stop=("<|eot_id|>", "<|end_of_text|>"),
)
