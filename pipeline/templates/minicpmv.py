"""The `minicpmv` template: MiniCPM-V 2.6. An image's own markers belong to its block of tokens."""

from __future__ import annotations

from pipeline.templates.render import Template

TEMPLATE = Template(
    name="minicpmv",
    control=(
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
        "<image>",
        "</image>",
        "<slice>",
        "</slice>",
        "<image_id>",
        "</image_id>",
        "<unk>",
    ),
    system="<|im_start|>system\n{content}<|im_end|>\n",
    user="<|im_start|>user\n{content}<|im_end|>\n",
    assistant="<|im_start|>assistant\n{content}<|im_end|>\n",
    answer="<|im_start|>assistant\n",
    default_system="You are a helpful assistant.",
    before_image="\n",
    after_image="\n",
    between_images="\n",
    between_texts="\n",
    stop=("<|im_end|>", "<|endoftext|>"),
)
