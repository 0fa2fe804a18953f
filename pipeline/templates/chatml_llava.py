"""The `chatml-llava` template: LLaVA-NeXT and LLaVA-OneVision on Qwen; LLaVA 1.6 on Yi."""

from __future__ import annotations

from pipeline.templates.render import Template

TEMPLATE = Template(
    name="chatml-llava",
    control=("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<image>"),
    system="<|im_start|>system\n{content}<|im_end|>\n",
    user="<|im_start|>user\n{content}<|im_end|>\n",
    assistant="<|im_start|>assistant\n{content}<|im_end|>\n",
    answer="<|im_start|>assistant\n",
    default_system="You are a helpful assistant.",
    after_image="\n",
    between_images="\n",
    stop=("<|im_end|>", "<|endoftext|>"),
)

YI = Template(
    name="chatml-llava",
    control=("<|im_start|>", "<|im_end|>", "<image>"),
    system="<|im_start|>system\n{content}<|im_end|>",
    user="<|im_start|>user\n{content}<|im_end|>",
    assistant="<|im_start|>assistant\n{content}<|im_end|>",
    answer="<|im_start|>assistant\n",
    default_system="Answer the questions.",
    after_image="\n",
    between_images="\n",
    stop=("<|im_end|>",),
)
