"""A tiny Janus made and answered, and its pictures drawn, by transformers 5.23 on torch 2.13.

python tests/golden/janus_reference.py [NAME...]
"""

import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from janus_cases import BEGIN, END, PAD, PROMPTS, SPECS, Spec
from reference import CASES, CORPUS, GOLDEN, STEPS, fill, with_pictures, write_tensors

from mlx_vlm_mini.families.janus import CHAT_TEMPLATE

warnings.filterwarnings("ignore")


def make_tokenizer() -> Any:
    """Byte-level, the begin token in front of each text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.BPE())
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet))
    places = {"image_token": "<image_placeholder>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}
    words.add_special_tokens([BEGIN, END, PAD, *places.values(), "<|User|>", "<|Assistant|>"])
    words.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, words.token_to_id(BEGIN))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token=BEGIN, eos_token=END, pad_token=PAD, extra_special_tokens=places
    )


def make_processor(spec: Spec) -> Any:
    from transformers import JanusProcessor
    from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

    images = JanusImageProcessorPil(
        size={"height": spec.image_size, "width": spec.image_size},
        min_size=4,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        do_convert_rgb=True,
    )
    tokens = (spec.vision["image_size"] // spec.vision["patch_size"]) ** 2
    return JanusProcessor(
        images, make_tokenizer(), chat_template=CHAT_TEMPLATE, use_default_system_prompt=spec.default_system,
        num_image_tokens=tokens,
    )  # fmt: skip


def save(spec: Spec, folder: Path) -> None:
    """The layout of the Hub's files: what encodes pictures is there in part, though nothing needs it."""
    from safetensors.torch import load_file
    from transformers import JanusConfig, JanusForConditionalGeneration

    processor = make_processor(spec)
    tokenizer = processor.tokenizer
    tokens = (spec.vision["image_size"] // spec.vision["patch_size"]) ** 2
    config = JanusConfig(
        vision_config={**spec.vision, "num_image_tokens": tokens}, vq_config=spec.vq,
        text_config={**spec.text, "model_type": "llama", "vocab_size": len(tokenizer) + 5, "tie_word_embeddings": False},
        image_token_id=tokenizer.image_token_id,
    )  # fmt: skip
    model = fill(JanusForConditionalGeneration(config).eval(), spec.seed).to(torch.bfloat16)
    settings = model.generation_config
    settings.bos_token_id, settings.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    settings.pad_token_id, settings.guidance_scale = tokenizer.pad_token_id, 5
    settings.generation_kwargs = {"boi_token_id": tokenizer.boi_token_id}
    folder.mkdir(parents=True)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    unread = [name for name in tensors if ".vqmodel.encoder." in name and not name.endswith("conv_in.bias")]
    write_tensors(spec, folder, {name: tensor for name, tensor in tensors.items() if name not in unread})  # type: ignore[arg-type]
    content = json.loads((folder / "config.json").read_text())
    defaults = {
        "vision_config": {
            "hidden_act": "gelu", "layer_norm_eps": 1e-6, "attention_bias": True, "use_qk_norm": False, "num_channels": 3},
        "vq_config": {"hidden_act": "gelu", "out_channels": 3, "num_hidden_layers": 2},
    }  # fmt: skip
    for part, known in defaults.items():  # as the Hub's files, which leave out what their classes default to
        content[part] = {
            key: value for key, value in content[part].items() if known.get(key, value) != value or key not in known
        }
    content.pop("tie_word_embeddings", None)
    (folder / "config.json").write_text(json.dumps(content, indent=1))
    processor.save_pretrained(folder)
    stored = json.loads((folder / "processor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(stored.pop("image_processor"), indent=1))
    (folder / "processor_config.json").write_text(json.dumps(stored, indent=1))


class Reference:
    """A checkpoint folder opened by transformers in float32."""

    def __init__(self, folder: Path) -> None:
        from transformers import JanusForConditionalGeneration, JanusProcessor

        self.model = JanusForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.processor = JanusProcessor.from_pretrained(folder, backend="pil")
        stored = json.loads((folder / "generation_config.json").read_text())
        self.model.generation_config.generation_kwargs = stored["generation_kwargs"]  # which 5.23 does not read

    @torch.no_grad()
    def answer(self, messages: list[dict[str, Any]], steps: int = STEPS) -> dict[str, np.ndarray]:
        """As `Reference.answer` of reference.py."""
        plain, opened = with_pictures(messages, GOLDEN)
        text = self.processor.apply_chat_template(plain, add_generation_prompt=True)
        inputs = dict(self.processor(text=text, images=opened or None, return_tensors="pt"))
        ids = inputs["input_ids"]
        out = self.model(**inputs, use_cache=True)
        every = torch.log_softmax(out.logits[0], dim=-1)
        rows, tokens = [every[-1].numpy()], [int(every[-1].argmax())]
        while len(rows) < steps:
            out = self.model(input_ids=torch.tensor([tokens[-1:]]), past_key_values=out.past_key_values, use_cache=True)
            rows.append(torch.log_softmax(out.logits[0, -1], dim=-1).numpy())
            tokens.append(int(rows[-1].argmax()))
        answer = {
            "prompt_ids": ids[0].numpy().astype(np.int32),
            "prompt_logprobs": every[:-1].gather(1, ids[0, 1:, None])[:, 0].numpy(),
            "token_ids": np.array(tokens, dtype=np.int32),
            "logprobs": np.stack(rows),
        }
        if opened:
            answer["pixel_values"] = np.moveaxis(inputs["pixel_values"].numpy(), 1, -1)
        return answer

    def drawing_ids(self, prompt: str) -> torch.Tensor:
        """Token ids of what a picture is drawn after: int[1, L]."""
        messages = [{"role": "user", "content": [{"type": "text", "text": prompt}]}]
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        return self.processor(text=text, generation_mode="image", return_tensors="pt")["input_ids"]

    @torch.no_grad()
    def draw(self, prompt: str, guidance: float) -> dict[str, np.ndarray]:
        """`token_ids` int[N] of a picture drawn greedily, and its `pixels` uint8[side, side, 3].

        At 1 and below the reference applies no guidance and fails, so there its model is called as it calls it, with
        the conditional row alone.
        """
        ids = self.drawing_ids(prompt)
        if guidance > 1:
            found = self.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_mode="image", do_sample=False,
                guidance_scale=guidance,
            )  # fmt: skip
        else:
            inner, chosen = self.model.model, []
            embeddings, past = self.model.get_input_embeddings()(ids), None
            for _ in range(inner.vision_model.config.num_image_tokens):
                out = inner.language_model(inputs_embeds=embeddings, past_key_values=past, use_cache=True)
                past = out.past_key_values
                chosen.append(int(inner.generation_head(out.last_hidden_state[:, -1]).argmax()))
                embeddings = self.model.prepare_embeddings_for_image_generation(torch.tensor([[chosen[-1]]]))
            found = torch.tensor([chosen])
        return {
            "prompt_ids": ids[0].numpy().astype(np.int32),
            "token_ids": found[0].numpy().astype(np.int32),
            "pixels": self.pixels(found),
        }

    @torch.no_grad()
    def pixels(self, tokens: torch.Tensor) -> np.ndarray:
        """Image tokens int[1, N] to uint8[side, side, 3]."""
        decoded = self.model.decode_image_tokens(tokens).permute(0, 3, 1, 2)  # as 5.23 normalises without torchvision
        (image,) = self.processor.postprocess(list(decoded.float()), return_tensors="PIL.Image.Image")["pixel_values"]
        return np.array(image)


def expected(name: str) -> dict[str, np.ndarray]:
    """`case/what` to an array; of a drawing `draw/prompt/guidance/what`."""
    reference, found = Reference(GOLDEN / name), {}
    for case in SPECS[name].cases:
        found |= {f"{case}/{what}": array for what, array in reference.answer(CASES[case]).items()}
    for prompt, text in PROMPTS.items():
        for guidance in (5, 1):
            drawn = reference.draw(text, guidance)
            found |= {f"draw-{prompt}-{guidance}/{what}": array for what, array in drawn.items()}
    return found


if __name__ == "__main__":
    for name in sys.argv[1:] or SPECS:
        folder = GOLDEN / name
        shutil.rmtree(folder, ignore_errors=True)
        save(SPECS[name], folder)
        arrays = expected(name)
        np.savez_compressed(folder / "expected.npz", **arrays)
        print(name, sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) // 1024, "KiB")
        for case in [*SPECS[name].cases, *(key.split("/")[0] for key in arrays if key.endswith("/pixels"))]:
            print("  ", case, len(arrays[f"{case}/prompt_ids"]), "->", *arrays[f"{case}/token_ids"])
