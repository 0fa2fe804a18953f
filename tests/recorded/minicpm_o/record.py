"""Records what the official code of MiniCPM-o 2.6 makes of the small random checkpoint.

    VLM_BATCH_OFFICIAL_MINICPM_O=CODE PYTHONPATH=. python tests/recorded/minicpm_o/record.py FOLDER

CODE holds the repository's Python files (`modeling_minicpmo.py` and those beside it), written for
transformers 4.44.2; they are imported, run and never copied. Nothing is spoken: its configuration
and helpers of speech may be absent. Writes minicpm_o.json (prompt ids, greedy tokens) and
minicpm_o.safetensors (logits, and the features of the sounds).
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import types
import typing
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import Qwen2Config, WhisperConfig, WhisperFeatureExtractor

from tests.helpers.minicpm_checkpoint import write_minicpm_o
from tests.parity.minicpm_cases import SOUND_CASES, Case, Picture, pixels_of, samples_of
from tests.recorded.minicpm_v.record import Official

_STAND_INS = {
    "configuration_minicpm": ("ConditionalChatTTSConfig", "MiniCPMOConfig"),
    "utils": ("NumberToTextConverter", "sentence_end", "VoiceChecker"),
}


class OfficialO(Official):
    """MiniCPM-o without its speech."""

    modeling_file, processing_file = "modeling_minicpmo", "processing_minicpmo"
    prefix = "MiniCPMO"
    markers: typing.ClassVar = {
        **Official.markers,
        "audio_start_id": "<|audio_start|>",
        "audio_end_id": "<|audio_end|>",
        "spk_start_id": "<|spk_bos|>",
        "spk_end_id": "<|spk_eos|>",
    }

    def __init__(self, code: Path, folder: Path) -> None:
        for name, members in _STAND_INS.items():
            if not (code / f"{name}.py").exists():
                module = types.ModuleType(f"official_minicpm.{name}")
                vars(module).update(dict.fromkeys(members, Qwen2Config))
                sys.modules[module.__name__] = module
        super().__init__(code, folder)

    def _tokenizer(self) -> Any:
        tokenizer = super()._tokenizer()
        tokenizer.audio_start, tokenizer.audio_end = "<|audio_start|>", "<|audio_end|>"
        return tokenizer

    def _processor(self) -> Any:
        processor = super()._processor()
        processor.feature_extractor = WhisperFeatureExtractor()
        return processor

    def _config(self, values: dict[str, Any]) -> Any:
        from official_minicpm.modeling_navit_siglip import SiglipVisionConfig

        config = types.SimpleNamespace(**values)
        config.vision_config = SiglipVisionConfig(**values["vision_config"])
        config.audio_config = WhisperConfig(**values["audio_config"])
        config.audio_config._attn_implementation = "eager"
        config._attn_implementation = "eager"
        return config

    def _add_parts(self, model: Any) -> None:
        config, width = model.config, model.llm.config.hidden_size
        model.apm = model.init_audio_module()
        step = config.audio_pool_step
        model.audio_avg_pooler = torch.nn.AvgPool1d(step, stride=step)
        size = config.audio_config.encoder_ffn_dim // 4
        model.audio_projection_layer = self.modeling.MultiModalProjector(size, width)
        model.audio_encoder_layer = -1

    def inputs(self, case: Case) -> Any:
        """As `chat` does: with sound the template of spoken answers, in chunks of a second."""
        messages, images, sounds, turns = [], [], [], []
        for number, (role, parts) in enumerate(case.turns):
            texts = []
            for part in parts:
                if isinstance(part, str):
                    texts.append(part)
                elif isinstance(part, Picture):
                    images.append(Image.fromarray(pixels_of(part)))
                    texts.append("(<image>./</image>)")
                else:
                    sounds.append(samples_of(part))
                    turns.append(number)
                    texts.append("(<audio>./</audio>)")
            messages.append({"role": role, "content": "\n".join(texts)})
        prompt = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True,
            chat_template=SPOKEN if sounds else None,
        )  # fmt: skip
        return self.processor(
            [prompt], [images], [sounds], [turns], use_image_id=None, chunk_input=True
        )

    def embed(self, inputs: Any) -> torch.Tensor:
        data = dict(inputs)
        embeds, _ = self.model.get_vllm_embedding(data)
        chunk = self.model.config.audio_chunk_length
        return self.model.get_omni_embedding(data, embeds, chunk_length=chunk)


SPOKEN = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n<|spk_bos|><|spk|><|spk_eos|><|tts_bos|>' }}{% endif %}"
)


@torch.inference_mode()
def main(target: Path) -> None:
    torch.set_num_threads(1)
    code = Path(os.environ["VLM_BATCH_OFFICIAL_MINICPM_O"]).resolve()
    facts: dict[str, Any] = {}
    tensors: dict[str, torch.Tensor] = {}
    with tempfile.TemporaryDirectory() as scratch:
        official = OfficialO(code, write_minicpm_o(Path(scratch)))
        for name, case in SOUND_CASES.items():
            facts[name], logits = official.run(case)
            tensors[name] = logits[::3].contiguous()
    (target / "minicpm_o.json").write_text(json.dumps(facts), encoding="utf-8")
    save_file(tensors, target / "minicpm_o.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
