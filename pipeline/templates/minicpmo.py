"""The `minicpmo` template: MiniCPM-o 2.6, which is MiniCPM-V's with Qwen2.5's system text.

Prompts with sound have another frame (`SPOKEN`): no default system text, and the answer opens as
one that could be spoken.
"""

from __future__ import annotations

from dataclasses import replace

from pipeline.templates import minicpmv

_SPEECH = ("<|spk_bos|>", "<|spk|>", "<|spk_eos|>", "<|tts_bos|>")

TEMPLATE = replace(
    minicpmv.TEMPLATE,
    name="minicpmo",
    control=(
        *minicpmv.TEMPLATE.control, "<|audio_start|>", "<|audio_end|>", *_SPEECH, "<|tts_eos|>",
    ),
    default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    stop=(*minicpmv.TEMPLATE.stop, "<|tts_eos|>"),
)  # fmt: skip
SPOKEN = replace(
    TEMPLATE, default_system=None, answer=f"{minicpmv.TEMPLATE.answer}{''.join(_SPEECH)}"
)
