"""The `smolvlm` template: SmolVLM2. A blank opens a turn that begins with text."""

from __future__ import annotations

from pipeline.templates.render import Template

MOST_TILES = 6  # along a side, for which the tokenizer has tokens

TEMPLATE = Template(
    name="smolvlm",
    control=(
        "<|im_start|>",
        "<end_of_utterance>",
        "<fake_token_around_image>",
        "<global-img>",
        "<image>",
        *(f"<row_{r}_col_{c}>" for r in range(1, MOST_TILES + 1) for c in range(1, MOST_TILES + 1)),
    ),
    start="<|im_start|>",
    system="System:{content}<end_of_utterance>\n",
    user="User:{content}<end_of_utterance>\n",
    assistant="Assistant:{content}<end_of_utterance>\n",
    answer="Assistant:",
    text_opens=" ",
    stop=("<end_of_utterance>",),
)
