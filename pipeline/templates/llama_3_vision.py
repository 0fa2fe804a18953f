"""The `llama_3_vision` template: Llama 3.2 Vision, which refuses a system text beside images."""

from __future__ import annotations

from pipeline.templates.render import Template

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
