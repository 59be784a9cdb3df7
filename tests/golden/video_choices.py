"""What transformers' video processors choose: frames of a video, and the size of each. Written once, since these
processors need torchvision, whose build for CPUs not every package index has.

    python tests/golden/video_choices.py      # writes video_choices.json; needs torch, torchvision and transformers
"""

import json
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_suffix(".json")
KINDS = {"Qwen2VL": 100, "Qwen3VL": 8}
"""Video processors, and the most tokens of a video in the cases here."""


def main() -> None:
    import torch
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
    from transformers.video_utils import VideoMetadata

    classes = {"Qwen2VL": Qwen2VLVideoProcessor, "Qwen3VL": Qwen3VLVideoProcessor}
    rng = np.random.default_rng(0)
    frames, sizes = [], []
    for kind, tokens in KINDS.items():
        for _ in range(60):
            total, most = int(rng.integers(2, 400)), int(rng.integers(4, 60))
            rate, fps = float(rng.choice([5.0, 24.0, 29.97, 60.0])), float(rng.choice([0.5, 1.0, 2.0, 7.3]))
            metadata = VideoMetadata(total_num_frames=total, fps=rate)
            chosen = classes[kind](fps=fps, max_frames=most).sample_frames(metadata=metadata, fps=fps)
            case = {"kind": kind, "total": total, "rate": rate, "fps": fps, "most": most}
            frames.append({**case, "chosen": [int(index) for index in chosen]})
        for number in range(60):
            count, height, width = int(rng.integers(2, 40)), int(rng.integers(20, 400)), int(rng.integers(20, 400))
            limits = ((1, 10**5), (60000, 90000))[number % 2]
            cap = bool(rng.integers(2))
            options = {
                "size": {"shortest_edge": limits[0], "longest_edge": limits[1]}, "patch_size": 6,
                "cap_pixels_per_frame": cap, "max_video_tokens": tokens,
            }  # fmt: skip
            reference = classes[kind](**options)
            made = reference.resize(
                torch.zeros((1, count, 3, height, width), dtype=torch.uint8), reference.size, reference.resample,
                factor=12, temporal_factor=2, cap_pixels_per_frame=cap,
            )  # fmt: skip
            case = {"kind": kind, "options": options, "count": count, "size": [height, width]}
            sizes.append({**case, "fitted": list(made.shape[-2:])})
    parts = (",\n".join(json.dumps(case) for case in cases) for cases in (frames, sizes))
    FILE.write_text('{{"frames": [\n{}\n], "sizes": [\n{}\n]}}\n'.format(*parts), encoding="utf-8")


if __name__ == "__main__":
    main()
