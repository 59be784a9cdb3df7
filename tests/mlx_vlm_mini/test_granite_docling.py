"""Granite-Docling 258M, which is an Idefics3 with Granite's turns; parity is test_parity.py's.

Its sizes are recalled, not copied from the Hub: SigLIP 2 base at 512 pixels, and a Llama of 30 layers.
"""

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import PHOTO, check_fields, write_names
from reference import GOLDEN

from mlx_vlm_mini import load
from mlx_vlm_mini.checkpoints.folder import open_checkpoint
from mlx_vlm_mini.checkpoints.load import plan
from mlx_vlm_mini.families import find_family, idefics3
from mlx_vlm_mini.preprocessing.settings import image_settings

FOLDER = GOLDEN / "granite-docling"
CONFIG = {
    "model_type": "idefics3", "architectures": ["Idefics3ForConditionalGeneration"], "image_token_id": 100270,
    "scale_factor": 4, "tie_word_embeddings": True, "vocab_size": 100352, "pad_token_id": 100257,
    "text_config": {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5, "rope_theta": 100000.0, "vocab_size": 100352, "tie_word_embeddings": True,
    },
    "vision_config": {
        "model_type": "idefics3_vision", "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
        "num_attention_heads": 12, "image_size": 512, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh",
        "max_image_size": {"longest_edge": 512}, "size": {"longest_edge": 2048}, "use_base_siglip": True,
    },
}  # fmt: skip
PROCESSOR = {
    "image_processor_type": "Idefics3ImageProcessor", "do_image_splitting": True, "max_image_size": {"longest_edge": 512},
    "size": {"longest_edge": 2048}, "resample": 1, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
    "do_convert_rgb": True, "do_pad": True, "do_rescale": True, "do_resize": True, "do_normalize": True,
}  # fmt: skip


def test_config_and_processor_settings_are_read():
    assert find_family(CONFIG) is idefics3
    config = idefics3.config(CONFIG)
    check_fields(config, {
        "vision.image_size": 512, "vision.patch_size": 16, "vision.num_features": 1024, "vision.post_norm": True,
        "projector.shuffle.factor": 4, "projector.input_size": 768 * 16, "decoder.num_attention_heads": 9,
        "decoder.num_key_value_heads": 3, "decoder.tie_word_embeddings": True, "image_token_id": 100270,
    })  # fmt: skip
    settings = image_settings(PROCESSOR, "Idefics3")
    text = idefics3.image_text(config, settings, "\0", (3508, 2480))  # a page at 300 dots an inch: 4 x 3 tiles
    assert text.count("\0") == 64 * 13 and text.count("<row_4_col_3>") == 1 and "<row_4_col_4>" not in text
    assert text.endswith("\n\n<fake_token_around_image><global-img>" + "\0" * 64 + "<fake_token_around_image>")


def test_the_prompt_has_granites_turns():
    _, processor = load(FOLDER)
    inputs = processor([PHOTO, "Convert this page to docling."])
    text = processor.tokenizer.decode(inputs.input_ids[0].tolist(), skip_special_tokens=False)
    tile, around = "<image>" * 4, "<fake_token_around_image>"
    assert text.startswith(f"<|start_of_role|>user<|end_of_role|>{around}<row_1_col_1>{tile}{around}<row_1_col_2>")
    assert text.endswith(
        f"\n\n{around}<global-img>{tile}{around}Convert this page to docling.<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>"
    )
    assert int(inputs.slots.sum()) == 4 * len(inputs.images[0].pixel_values)
    assert processor.eos_token_ids == {processor.tokenizer.token_to_id("<|end_of_text|>")}


OTHERS = {"model.text_model.": "language_model.", "lm_head.": "language_model.lm_head.", "model.": ""}


@pytest.mark.parametrize("mlx", [False, True], ids=["Hub, transformers", "mlx-community"])
def test_every_layout_is_read(mlx, copy_of):
    def name(hub: str) -> str:
        begin = next(begin for begin in OTHERS if hub.startswith(begin))
        return OTHERS[begin] + hub.removeprefix(begin) if mlx else hub

    folder = copy_of(FOLDER.name)
    write_names(folder, idefics3, name, mlx=mlx)
    (expected, processor), (found, _) = load(FOLDER), load(folder)
    inputs = processor([PHOTO, "What?"])
    np.testing.assert_array_equal(np.array(found(inputs)), np.array(expected(inputs)))
    assert plan(open_checkpoint(folder)).unused == () and not mx.isnan(found(inputs)).any()
