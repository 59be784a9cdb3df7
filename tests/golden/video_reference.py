"""Videos of Qwen2-VL, 2.5-VL and 3-VL: what transformers' models answer about frames that the checkpoints beside this see.

    python tests/golden/video_reference.py      rewrites videos.npz

Its video processors need torchvision, so frames go through its image processor one by one and are joined here; where there
is torchvision, tests/test_reference_video.py compares with the processors themselves. `timed` asks for positions counted
as the authors do, which transformers 5.23 does not beyond a picture's longer side (mlx_vlm_mini/axes.py).
"""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

GOLDEN = Path(__file__).parent
NAMES = ("qwen2-vl", "qwen2.5-vl", "qwen3-vl")
STEPS = 11
SIZE = 36, 48  # pixels that need no resizing: 3 x 4 tokens
LIMITS = {"shortest_edge": 1000, "longest_edge": 4000}  # of a frame (Qwen3-VL: of all)
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<|vision_start|><|{{ part['type'] }}_pad|><|vision_end|>"
    "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def frames(count: int, size: tuple[int, int] = SIZE) -> list[np.ndarray]:
    """A disc that crosses stripes, uint8[height, width, 3] each."""
    y, x = np.mgrid[: size[0], : size[1]]
    found = []
    for number in range(count):
        stripes = (x * 5 + y * 3 + number * 21) % 256
        disc = (x - 6 - 7 * number) ** 2 + (y - size[0] // 2) ** 2 < 80
        found.append(
            np.stack([stripes, np.where(disc, 250, 40), (y * 6 + number * 30) % 256], axis=-1).astype(np.uint8)
        )
    return found


def video(count: int, fps: float, size: tuple[int, int] = SIZE) -> dict[str, Any]:
    return {"type": "video", "video": frames(count, size), "fps": fps}


def say(*parts: Any) -> dict[str, Any]:
    return {
        "role": "user",
        "content": [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts],
    }


PHOTO = {"type": "image", "image": "photo.jpg"}
ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "A disc."}]}
CASES: dict[str, list[dict[str, Any]]] = {
    "even": [say(video(4, 6.4), "What moves?")],
    "odd": [say("Look:", video(5, 6.4), "What moves?")],
    "one": [say(video(1, 2), "What?")],
    "mixed": [say(PHOTO, video(3, 8.0), "Compare."), ANSWER, say("And", video(2, 3.0), PHOTO, "?")],
    "timed": [say(video(9, 2.0), "Then", video(2, 1.0), "what?")],
}


def join(patches: list[np.ndarray], patch: int) -> np.ndarray:
    """Patches of each frame as an image, float[N, 3 * 2 * patch**2], to those of the video, in its order."""
    patches = patches + patches[-1:] * (len(patches) % 2)
    split = [each.reshape(len(each), 3, 2, patch, patch)[:, :, 0] for each in patches]
    steps = [np.stack(split[i : i + 2], axis=2) for i in range(0, len(split), 2)]
    return np.concatenate([step.reshape(len(step), -1) for step in steps])


def positions_of(kinds: np.ndarray, grids: list[tuple[int, list[int]]]) -> np.ndarray:
    """Positions as the authors count them, int[3, L]: what follows a picture begins behind the largest of its own.

    Args:
        kinds: int[L], 0 text, 1 image, 2 video.
        grids: of each image and video in order, its rows and columns, and the times of its steps.
    """
    found: list[np.ndarray] = []
    place, waiting = 0, list(grids)
    while place < len(kinds):
        begin = int(np.max(np.concatenate(found, axis=1))) + 1 if found else 0
        if not kinds[place]:
            found.append(np.full((3, 1), begin))
            place += 1
            continue
        rows, columns, times = waiting.pop(0)
        grid = np.array([(t, r, c) for t in times for r in range(rows) for c in range(columns)]).T
        found.append(grid + begin)
        place += grid.shape[1]
    return np.concatenate(found, axis=1)


class VideoReference:
    """A checkpoint folder opened by transformers in float32, its processor without the half that is for videos."""

    def __init__(self, folder: Path) -> None:
        import torch
        from qwen_reference import images_only
        from transformers import AutoModelForImageTextToText

        self.model = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.family = self.model.config.model_type
        self.processor = images_only(self.family).from_pretrained(folder, backend="pil")
        self.processor.video_token = None
        self.video_id = self.processor.tokenizer.convert_tokens_to_ids("<|video_pad|>")
        self.model.config.video_token_id = self.model.model.config.video_token_id = self.video_id

    def inputs(self, messages: list[dict[str, Any]]) -> tuple[dict[str, Any], list[Any]]:
        """What the model takes, and the grids of all images and videos in order."""
        import torch

        text = self.processor.apply_chat_template(
            messages_without_data(messages), add_generation_prompt=True, chat_template=TEMPLATE
        )
        parts = [part for message in messages for part in message["content"] if part["type"] != "text"]
        images = [Image.open(GOLDEN / part["image"]) for part in parts if part["type"] == "image"]
        settings = self.processor.image_processor
        merge, patch = settings.merge_size, settings.patch_size
        values, grids, seconds, all_grids = [], [], [], []
        for part in parts:
            if part["type"] == "image":
                made = settings([Image.open(GOLDEN / part["image"])], return_tensors="np")
                _, rows, columns = made["image_grid_thw"][0].tolist()
                all_grids.append((rows // merge, columns // merge, [0]))
                continue
            made = settings([Image.fromarray(frame) for frame in part["video"]], size=LIMITS, return_tensors="np")
            _, rows, columns = made["image_grid_thw"][0].tolist()
            count, size = len(part["video"]), rows * columns
            values.append(join([made["pixel_values"][i * size : (i + 1) * size] for i in range(count)], patch))
            steps = (count + 1) // 2
            grids.append([steps, rows, columns])
            seconds.append(2 / part["fps"])
            text = text.replace(
                "<|vision_start|><|video_pad|><|vision_end|>", self._said(part, steps, size // merge**2), 1
            )
            step = 4 * seconds[-1] if self.family == "qwen2_5_vl" else 1
            times = [int(np.float32(step) * i) for i in range(steps)]
            whole = [(rows // merge, columns // merge, times)]
            all_grids += (
                whole if not self.family.startswith("qwen3") else [(rows // merge, columns // merge, [0])] * steps
            )
        text = text.replace("<|VIDEO|>", "<|video_pad|>")
        inputs = dict(self.processor(text=text, images=images or None, return_tensors="pt"))
        ids = inputs["input_ids"]
        inputs["mm_token_type_ids"] = (ids == self.processor.image_token_id) * 1 + (ids == self.video_id) * 2
        inputs["pixel_values_videos"] = torch.tensor(np.concatenate(values))
        inputs["video_grid_thw"] = torch.tensor(grids)
        if self.family == "qwen2_5_vl":
            inputs["second_per_grid_ts"] = torch.tensor(seconds)
        return inputs, all_grids

    def _said(self, part: dict[str, Any], steps: int, tokens: int) -> str:
        if not self.family.startswith("qwen3"):
            return "<|vision_start|>" + "<|VIDEO|>" * (steps * tokens) + "<|vision_end|>"
        times = [number / part["fps"] for number in range(len(part["video"]))]
        times += times[-1:] * (len(times) % 2)
        means = [(times[i] + times[i + 1]) / 2 for i in range(0, len(times), 2)]
        return "".join(f"<{mean:.1f} seconds><|vision_start|>{'<|VIDEO|>' * tokens}<|vision_end|>" for mean in means)

    def answer(
        self, messages: list[dict[str, Any]], *, own_positions: bool, steps: int = STEPS
    ) -> dict[str, np.ndarray]:
        inputs, grids = self.inputs(messages)
        return decode(self.model, inputs, steps, grids if own_positions else None)


def decode(model: Any, inputs: dict[str, Any], steps: int, grids: Any = None) -> dict[str, np.ndarray]:
    """Prefill and cached greedy decoding; with `grids` by positions counted here."""
    import torch

    ids, rows, tokens, more = inputs["input_ids"], [], [], {}
    model.model.rope_deltas = None
    if grids is not None:
        positions = positions_of(inputs["mm_token_type_ids"][0].numpy(), grids)
        more["position_ids"] = torch.tensor(positions)[:, None]
    with torch.no_grad():
        out = model(**{key: value for key, value in inputs.items() if key != "attention_mask"}, **more, use_cache=True)
        while True:
            rows.append(torch.log_softmax(out.logits[0, -1], dim=-1).numpy())
            tokens.append(int(rows[-1].argmax()))
            if len(rows) == steps:
                break
            if grids is not None:
                more["position_ids"] = torch.full((3, 1, 1), int(positions.max()) + len(rows))
            out = model(
                input_ids=torch.tensor([[tokens[-1]]]), past_key_values=out.past_key_values, use_cache=True, **more
            )
    return {
        "prompt_ids": ids[0].numpy().astype(np.int32),
        "token_ids": np.array(tokens, dtype=np.int32),
        "logprobs": np.stack(rows),
    }


def messages_without_data(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            **message,
            "content": [part if part["type"] == "text" else {"type": part["type"]} for part in message["content"]],
        }
        for message in messages
    ]


def expected_videos(name: str) -> dict[str, np.ndarray]:
    """What the reference answers to every case, computed now: `name/case/what` to an array."""
    reference = VideoReference(GOLDEN / name)
    return {
        f"{name}/{case}/{what}": array
        for case, messages in CASES.items()
        for what, array in reference.answer(messages, own_positions=case == "timed").items()
    }


if __name__ == "__main__":
    found: dict[str, np.ndarray] = {}
    for each in NAMES:
        found |= expected_videos(each)
    np.savez_compressed(GOLDEN / "videos.npz", **found)
    print((GOLDEN / "videos.npz").stat().st_size // 1024, "KiB")
