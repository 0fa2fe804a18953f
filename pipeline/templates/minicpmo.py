"""The `minicpmo` template: MiniCPM-o 2.6, which is MiniCPM-V's with Qwen2.5's system text."""

from __future__ import annotations

from dataclasses import replace

from pipeline.templates import minicpmv

TEMPLATE = replace(
    minicpmv.TEMPLATE,
    name="minicpmo",
    control=(*minicpmv.TEMPLATE.control, "<|audio_start|>", "<|audio_end|>"),
    default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
)
