"""The `mistral` template: Pixtral, without blanks, system text in the last user turn; LLaVA 1.6."""

from __future__ import annotations

from dataclasses import replace

from pipeline.templates.render import Template

TEMPLATE = Template(
    name="mistral",
    control=("<s>", "</s>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"),
    start="<s>",
    user="[INST]{content}[/INST]",
    assistant="{content}</s>",
    answer="",
    system_opens="last",
    blank_system=False,
    alternate=True,
    stop=("</s>",),
)

# Pixtral Large: the system text has a frame, and each text a blank before it (the tokenizer's).
LARGE = replace(
    TEMPLATE,
    control=(*TEMPLATE.control, "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    system="[SYSTEM_PROMPT]{content}[/SYSTEM_PROMPT]",
    blank_system=True,
)

LLAVA = Template(
    name="mistral",
    control=("<s>", "</s>", "<image>"),
    start="<s>",
    user="[INST] {content} [/INST]",
    assistant=" {content} </s>",
    answer="",
    after_image="\n",
    between_images="\n",
    system_start="<<SYS>>\n",
    system_separator="\n<</SYS>>\n\n",
    blank_system=False,
    alternate=True,
    stop=("</s>",),
)
