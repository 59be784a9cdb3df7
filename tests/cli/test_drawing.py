"""generate --draw: a checkpoint that says where a cat is, through the real command."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import PHOTO, PLAIN, SHAPES, random_mask_decoder
from click.testing import CliRunner, Result
from mlx.utils import tree_map_with_path
from PIL import Image

from mlx_vlm_mini import draw_detections, find_detections, load
from mlx_vlm_mini.cli.main import main
from mlx_vlm_mini.grounding.mask_decoder import FILE, load_mask_decoder
from mlx_vlm_mini.images.source import open_image

BOX = "<loc0100><loc0200><loc0900><loc0800>"
SEGMENTS = "".join(f"<seg{code:03d}>" for code in range(16))


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def saying(copy_of):
    """Make a PaliGemma whose layers do nothing and whose head gives each token of a text its next one."""

    def make(text: str) -> Path:
        folder = copy_of("paligemma-gemma")
        model, processor = load(folder)
        idle = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
        model.decoder.update(
            tree_map_with_path(
                lambda name, array: array * 0 if name.endswith(idle) else array, model.decoder.parameters()
            )
        )
        tokens = [processor.tokenizer.token_to_id("\n"), *processor.tokenizer.backend.encode(text).ids, 1]
        assert len(set(tokens)) == len(tokens)
        states = model.decoder(model.decoder.read(mx.array([tokens[:-1]])))[0]
        head = np.zeros(model.decoder.embed_tokens.weight.shape, dtype=np.float32)
        head[tokens[1:]] = np.array(states / mx.linalg.norm(states, axis=-1, keepdims=True))
        tensors = mx.load(str(folder / "model.safetensors"))
        tensors = {name: array * 0 if name.endswith(idle) else array for name, array in tensors.items()}
        tensors["language_model.lm_head.weight"] = mx.array(head)
        mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "pt"})
        assert run("generate", folder, "-p", "x", "-i", PHOTO).stdout == text + "\n"
        return folder

    return make


def test_the_box_and_the_mask_of_an_answer(saying, tmp_path):
    folder, out = saying(f"{BOX}{SEGMENTS} cat"), tmp_path / "out.png"
    ask = ("generate", folder, "-p", "segment cat", "-i", PHOTO, "--draw", out, "--json")
    image = open_image(PHOTO)

    result = run(*ask)
    answer = json.loads(result.stdout)
    box = [
        round(200 / 1024 * image.width),
        round(100 / 1024 * image.height),
        round(800 / 1024 * image.width),
        round(900 / 1024 * image.height),
    ]
    assert answer["detections"] == [{"label": "cat", "box": box, "mask_codes": list(range(16))}]
    assert result.exit_code == 0 and result.stderr == (
        "the answer names masks, only its boxes are drawn: for masks download "
        f"https://huggingface.co/spaces/big-vision/paligemma-hf/resolve/main/{FILE} and give --mask-decoder {FILE}\n"
    )
    with Image.open(out) as boxes:
        assert (boxes.format, boxes.size) == ("PNG", image.size)
        expected = draw_detections(image, find_detections(answer["text"], height=image.height, width=image.width))
        assert boxes.tobytes() == expected.tobytes() != image.tobytes()

    random_mask_decoder(tmp_path / FILE)
    decode = load_mask_decoder(tmp_path / FILE)
    found = find_detections(answer["text"], height=image.height, width=image.width, decode_masks=decode)
    expected = draw_detections(image, found)
    with_masks = run(*ask, "--mask-decoder", tmp_path / FILE)
    assert (with_masks.exit_code, with_masks.stderr) == (0, "")
    with Image.open(out) as masks:  # written over the other
        assert masks.tobytes() == expected.tobytes() != boxes.tobytes()
    out.unlink()
    (tmp_path / FILE).rename(folder / FILE)  # where it is found by itself
    assert run(*ask).stderr == ""
    with Image.open(out) as masks:
        assert masks.tobytes() == expected.tobytes()


def test_an_answer_without_boxes_leaves_the_picture_as_it_was(tmp_path):
    out = tmp_path / "out.png"
    result = run("generate", PLAIN, "-p", "What?", "-i", PHOTO, "--max-tokens", 3, "--draw", out)
    assert result.exit_code == 0
    assert result.stderr == f"the answer names no boxes: {out} is the image as it was\n"
    with Image.open(out) as drawn:
        assert drawn.tobytes() == open_image(PHOTO).tobytes()


def test_what_cannot_be_drawn_is_refused_before_anything_is_loaded(tmp_path):
    own = tmp_path / "own.png"
    own.write_bytes(SHAPES.read_bytes())
    out = tmp_path / "out.png"
    for arguments, message in [
        (["--draw", out], "--draw needs one image to draw on, not 0"),
        (["--draw", out, "-i", PHOTO, "-i", own], "--draw needs one image to draw on, not 2"),
        (["--draw", tmp_path / "out.jpg", "-i", PHOTO], "out.jpg does not end in .png"),
        (["--draw", own, "-i", own], "--draw would overwrite the image itself"),
        (["--draw", own, "-i", tmp_path / "." / "own.png"], "--draw would overwrite the image itself"),
        (["--draw", tmp_path / "no" / "out.png", "-i", PHOTO], "there is no folder"),
        (["--mask-decoder", FILE, "-i", PHOTO], "--mask-decoder needs --draw"),
    ]:
        result = run("generate", "/no/such", "-p", "x", *arguments)
        assert result.exit_code == 2 and message in " ".join(result.stderr.split()), (arguments, result.stderr)
    missing = run("generate", PLAIN, "-p", "x", "-i", PHOTO, "--draw", out, "--mask-decoder", tmp_path / FILE)
    assert missing.exit_code == 1 and missing.stderr.startswith("Error: mask decoder not found: ")
    assert own.read_bytes() == SHAPES.read_bytes() and [file.name for file in tmp_path.iterdir()] == ["own.png"]
