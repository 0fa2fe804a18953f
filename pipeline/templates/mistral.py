"""The `mistral` template: Pixtral, without blanks; the system text opens the last user turn."""

from __future__ import annotations

from pipeline.templates.render import Template

TEMPLATE = Template(
    name="mistral",
    control=("<s>", "</s>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"),
    start="<s>",
    user="[INST]{content}[/INST]",
    assistant="{content}</s>",
    answer="",
    system_opens="last",
    alternate=True,
    stop=("</s>",),
)
