"""The `kimi-vl` template: Kimi-VL as its own chat template writes it."""

from __future__ import annotations

from pipeline.templates.render import Template

TEMPLATE = Template(
    name="kimi-vl",
    control=(
        "<|im_system|>",
        "<|im_user|>",
        "<|im_assistant|>",
        "<|im_middle|>",
        "<|im_end|>",
        "<|media_start|>",
        "<|media_content|>",
        "<|media_end|>",
        "<|media_pad|>",
        "[BOS]",
        "[EOS]",
        "[EOT]",
    ),
    system="<|im_system|>system<|im_middle|>{content}<|im_end|>",
    user="<|im_user|>user<|im_middle|>{content}<|im_end|>",
    assistant="<|im_assistant|>assistant<|im_middle|>{content}<|im_end|>",
    answer="<|im_assistant|>assistant<|im_middle|>",
    default_system="You are a helpful assistant",
    image="<|media_start|>image<|media_content|>{image}<|media_end|>",
    stop=("<|im_end|>", "[EOS]"),
)
