"""Where the model looked: the attention of an answer's tokens over the pictures of its conversation."""

import asyncio
import base64
import io
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from PIL import Image
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mlx_vlm_mini.errors import ContextError
from mlx_vlm_mini.generation.decode import one_at_a_time
from mlx_vlm_mini.generation.engine import Engine
from mlx_vlm_mini.grounding.attend import attend
from mlx_vlm_mini.grounding.attended import AnswerAttention
from mlx_vlm_mini.grounding.heat import heat_of, open_pictures

from .questions import read_answer
from .refusals import Refusal
from .server import Server

_CELLS = 48  # along a picture's heat at most
_MOST = 4_000_000  # cells of all tokens
_MOST_TOKENS = 2048  # of an answer
_SIDE = 768  # pixels along a picture


async def attention(server: Server, request: Request) -> Response:
    """`POST /v1/attention`: `messages` as of a chat completion, the last of which is the answer to be explained.

    Of each token the text and what share of its attention the pictures have; of each picture its JPEG and, for each
    token, a grid of bytes, 255 being the most that the token has anywhere.
    """
    async with server.bodies.read(request) as body:
        name, messages, answer = read_answer(body, server.limits)
        body.clear()
        model = server.models.find(name)
        with server.desk.admit():
            async with server.models.use(model) as engine:
                opened = await server.desk.open_pictures(messages, engine)
                loop = asyncio.get_running_loop()
                found = await loop.run_in_executor(server.desk.looking, partial(_look, engine, opened, answer))
    return JSONResponse({"object": "attention", "model": model.name, **found})


def _look(engine: Engine, messages: Sequence[Mapping[str, Any]], answer: str) -> dict[str, Any]:
    said = [*messages, {"role": "assistant", "content": answer}]
    length = len(engine.processor(said, add_generation_prompt=False).slots)
    if engine.context is not None and length > engine.context:
        raise ContextError(f"the conversation has {length} tokens, and the model's context is {engine.context}")
    tokens = len(engine.processor.tokenizer.encode(answer))
    if tokens > _MOST_TOKENS:  # nobody else is answered while it is looked at
        raise Refusal(400, f"the answer has {tokens} tokens, and {_MOST_TOKENS} at most are explained", "messages")
    found = one_at_a_time(lambda: attend(engine.model, engine.processor, messages, answer=answer)).mean()
    pictures = open_pictures(found, _SIDE)
    cells = int(min(_CELLS, (_MOST / len(found.tokens) / len(pictures)) ** 0.5))
    if not cells:
        raise Refusal(400, "the answer is too long to be explained: shorten it")
    grids = []
    for picture in pictures:
        scale = cells / max(picture.size)
        grids.append((max(1, round(picture.height * scale)), max(1, round(picture.width * scale))))
    heats = [heat_of(found, token, grids) for token in range(len(found.tokens))]
    images = [
        {
            "width": picture.width, "height": picture.height, "rows": rows, "columns": columns,
            "picture": f"data:image/jpeg;base64,{_jpeg(picture)}",
            "heats": [_bytes(heat[number]) for heat in heats],
        }
        for number, (picture, (rows, columns)) in enumerate(zip(pictures, grids, strict=True))
    ]  # fmt: skip
    return {"tokens": _tokens(found), "images": images}


def _tokens(found: AnswerAttention) -> list[dict[str, Any]]:
    return [{"text": text, "share": float(share)} for text, share in zip(found.texts, found.shares, strict=True)]


def _bytes(heat: np.ndarray) -> str:
    return base64.b64encode((np.clip(heat, 0, 1) * 255).round().astype(np.uint8).tobytes()).decode()


def _jpeg(picture: Image.Image) -> str:
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=85)
    return base64.b64encode(out.getvalue()).decode()
