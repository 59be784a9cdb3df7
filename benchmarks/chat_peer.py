"""The peer's side of chat.py, run by the peer's own Python: its chat command's loop, without its terminal.

    python chat_peer.py '{"folder": ..., "image": ..., "questions": [...], "answer": ..., "rounds": 3}'

The last line of its output is JSON.
"""

import json
import sys
import time
from importlib.metadata import version
from typing import Any


def main(job: dict[str, Any]) -> None:
    import mlx.core as mx
    import mlx_vlm.chat as room
    from mlx_vlm.generate import PromptCacheState
    from mlx_vlm.vision_cache import VisionFeatureCache

    chat = room.MLXVisionChat(job["folder"], temperature=0.0)
    tokenizer = getattr(chat.processor, "tokenizer", chat.processor)
    said = tokenizer.encode(job["answer"], add_special_tokens=False)
    chat.max_tokens = len(said)
    encoded, seen = [], {}
    tower = type(chat.model.vision_tower)
    plain_call, plain_stream = tower.__call__, room.stream_generate
    tower.__call__ = lambda self, *given, **named: encoded.append(1) or plain_call(self, *given, **named)

    def timed(*given: Any, **named: Any) -> Any:
        begin = time.perf_counter()
        for number, chunk in enumerate(plain_stream(*given, **named)):
            if number == 0:
                seen["first_s"] = time.perf_counter() - begin
            seen["prompt"] = getattr(chunk, "prompt_tokens", None)
            seen["cached"] = getattr(chunk, "cached_tokens", None)
            yield chunk

    room.stream_generate = timed
    rounds = []
    for _ in range(job["rounds"] + 1):
        chat.history.clear()
        chat.vision_cache, chat.prompt_cache_state = VisionFeatureCache(), PromptCacheState()
        chat.process_image(job["image"])
        turns = []
        for question in job["questions"]:
            encoded.clear()
            tokens = iter(said)
            chat.stream_kwargs = {"sampler": lambda _, tokens=tokens: mx.array([next(tokens, said[-1])])}
            chat.add_to_history("user", question)
            chat.add_to_history("assistant", chat.generate_response())
            turns.append({**seen, "encoded": len(encoded)})
        rounds.append(turns)
    print()
    print(json.dumps({"name": f"mlx-vlm {version('mlx-vlm')}", "rounds": rounds[1:]}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
