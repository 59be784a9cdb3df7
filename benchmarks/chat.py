"""What a follow-up costs: a picture and a question, then four short questions.

    python benchmarks/chat.py MODEL [--image PICTURE] [--rounds 3] [--peer PYTHON]

MODEL is a checkpoint folder. Of each turn: milliseconds to the first token (the least of the rounds, each of which is a
conversation of its own), how many times faster than turn 1 that is, pictures encoded, tokens found in the cache, tokens
of the prompt. The model computes, but what it says is given, so that a model with random weights will do. `--peer` is a
Python with mlx-vlm, whose chat command's own loop is run the same way by chat_peer.py. The first conversation warms up
and is not counted.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from mlx_vlm_mini.layers.cpu.blas import use_openblas

use_openblas()  # before anything imports mlx

import mlx.core as mx

from mlx_vlm_mini import Chat, load

QUESTIONS = ("What is in this picture?", "Which colours?", "Why?", "Is it day or night?", "Say it shorter.")
ANSWER = "There is a small house with a red roof under a tree."
Turn = dict[str, float | None]


def converse(folder: str, image: Path, rounds: int) -> list[list[Turn]]:
    model, processor = load(folder)
    said = processor.tokenizer.encode(ANSWER, add_special_tokens=False)
    answered = []
    for _ in range(rounds + 1):
        chat = Chat(model, processor, max_tokens=len(said))
        turns = []
        for number, question in enumerate(QUESTIONS):
            tokens = iter(said)
            prompt = [image, question] if number == 0 else question
            stats = list(chat.send(prompt, sampler=lambda _, tokens=tokens: mx.array([next(tokens)])))[-1].stats
            turns.append(
                {
                    "first_s": stats.first_token_s,
                    "encoded": stats.encoded_images,
                    "cached": stats.cached_tokens,
                    "prompt": stats.prompt_tokens,
                }
            )
        answered.append(turns)
    return answered[1:]


def report(name: str, rounds: list[list[Turn]]) -> None:
    print(f"\n{name}\n\n| turn | first token | times faster than turn 1 | pictures encoded | cached | prompt |")
    print("| --- | --- | --- | --- | --- | --- |")
    least = [min(turn["first_s"] or 0.0 for turn in turns) for turns in zip(*rounds, strict=True)]
    for number, (seconds, turn) in enumerate(zip(least, rounds[-1], strict=True), 1):
        shown = ["?" if turn[key] is None else str(turn[key]) for key in ("encoded", "cached", "prompt")]
        print(f"| {number} | {seconds * 1000:,.0f} ms | {least[0] / seconds:.1f} | {' | '.join(shown)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--image", type=Path, default=Path(__file__).parent.parent / "tests/golden/photo.jpg")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", metavar="PYTHON")
    options = parser.parse_args()
    job = {
        "folder": options.model, "image": str(options.image), "questions": QUESTIONS, "answer": ANSWER,
        "rounds": options.rounds,
    }  # fmt: skip
    report("mlx-vlm-mini", converse(options.model, options.image, options.rounds))
    if options.peer:
        command = [options.peer, Path(__file__).with_name("chat_peer.py"), json.dumps(job)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"the peer failed with exit code {done.returncode}")
        found = json.loads(done.stdout.splitlines()[-1])
        report(found["name"], found["rounds"])


if __name__ == "__main__":
    main()
