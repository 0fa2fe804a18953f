"""The `qwen2-vl` template: Qwen2-VL, Qwen2.5-VL; Qwen3-VL without a default system text."""

from __future__ import annotations

from dataclasses import replace

from pipeline.templates.render import Template

TEMPLATE = Template(
    name="qwen2-vl",
    control=(
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|vision_pad|>",
        "<|image_pad|>",
        "<|video_pad|>",
    ),
    system="<|im_start|>system\n{content}<|im_end|>\n",
    user="<|im_start|>user\n{content}<|im_end|>\n",
    assistant="<|im_start|>assistant\n{content}<|im_end|>\n",
    answer="<|im_start|>assistant\n",
    default_system="You are a helpful assistant.",
    image="<|vision_start|>{image}<|vision_end|>",
    stop=("<|im_end|>", "<|endoftext|>"),
)

QWEN3 = replace(TEMPLATE, default_system=None)
