"""The processor: messages with images -> everything the model needs."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_vlm_mini.images.source import LOCAL, Access, ImageSource, Picture, open_image, read_image
from mlx_vlm_mini.images.video import Video
from mlx_vlm_mini.preprocessing.crops import Crops
from mlx_vlm_mini.preprocessing.grid import Grid, PatchGrid
from mlx_vlm_mini.preprocessing.settings import ImageSettings
from mlx_vlm_mini.preprocessing.slices import IMAGE_NUMBER, Slices
from mlx_vlm_mini.preprocessing.splits import Splits
from mlx_vlm_mini.preprocessing.tiles import Tiles
from mlx_vlm_mini.preprocessing.video import VideoLayout, VideoSettings, read_clip
from mlx_vlm_mini.text.literal import mark, unmark
from mlx_vlm_mini.text.messages import Message, Prompt, images_of, text_of, to_messages
from mlx_vlm_mini.text.template import ChatTemplate
from mlx_vlm_mini.text.thinking import answer_begins
from mlx_vlm_mini.text.tokenizer import Tokenizer

from .config import VLMConfig
from .errors import CheckpointError, PromptError
from .families import Family
from .inputs import InputImage, Inputs


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """An image as the vision tower takes it, so that a conversation prepares it once.

    Attributes:
        pixel_values: float32[B, height, width, 3], one row or one a tile.
        slices: further rows of another size, see `InputImage`.
        size: height and width in pixels, as it was opened.
        text: what stands for it in the prompt; `IMAGE_NUMBER` in it is the number of the image there, from 0.
        digest: SHA-256 of its size and all its pixels.
        origin: what it was made of; its `data` are left out where they can be read again from its path.
        video, layout: of a video, whose rows are its steps, each with the channels of all its frames.
        among: what it becomes where it is not the conversation's only image; None where that is the same.
        budget: tokens that it was allowed to have; None: as the checkpoint says.
    """

    pixel_values: np.ndarray
    size: tuple[int, int]
    text: str
    digest: bytes
    origin: Picture
    among: "PreparedImage | None" = None
    video: Video | None = None
    layout: VideoLayout = field(default_factory=lambda: VideoLayout("", (0,)))
    slices: np.ndarray | None = None
    budget: int | None = None

    @property
    def nbytes(self) -> int:
        """Of all its pixels."""
        more = 0 if self.slices is None else self.slices.nbytes
        return self.pixel_values.nbytes + more + (0 if self.among is None else self.among.nbytes)

    @property
    def again(self) -> Picture | Path:
        """What it can be made of once more."""
        return self.origin if self.origin.data is not None or self.origin.path is None else self.origin.path


@dataclass(frozen=True)
class DrawingTokens:
    """What stands in the prompt of a picture that is drawn: ids of the token that begins every prompt, of the one after
    which image tokens follow, and of the one that stands for words in the prompt without any."""

    begin: int
    image: int
    pad: int


_NO_IMAGE = "\ue002\ue003"  # in place of the image token of a model that reads text alone


def without_data(picture: Picture) -> Picture:
    """What is kept of a picture: where it lies; the data alone where it lies nowhere."""
    return picture if picture.path is None else replace(picture, data=None)


class Processor:
    """Turns prompts into model inputs, as the checkpoint's own files say.

    Attributes:
        tokenizer: text to ids and back.
        instruction_tokenizer: what a Q-Former reads texts by (InstructBLIP).
        image_token, image_token_id: what stands in the prompt where a row of image features goes.
        access: what names of images may reach: who serves others sets `image.SERVED`.
        eos_token_ids: the ids that end an answer.
        stops: texts that end it, too.
        preamble: text before the rendered template of every prompt that is answered.
        drawing_tokens: of a model that draws.
        marker_texts: of special tokens that are part of a marker around an answer's thinking, which `decode` leaves
            out, id to text.
    """

    def __init__(
        self,
        config: VLMConfig,
        family: Family,
        *,
        tokenizer: Tokenizer,
        chat_template: str,
        image_settings: ImageSettings | None,
        eos_token_ids: frozenset[int],
        video_settings: VideoSettings | None = None,
        instruction_tokenizer: Tokenizer | None = None,
        preamble: str = "",
        drawing_tokens: DrawingTokens | None = None,
        access: Access = LOCAL,
    ) -> None:
        self.config = config
        self.access = access
        self.family = family
        self.tokenizer = tokenizer
        self.instruction_tokenizer = instruction_tokenizer
        self.image_settings = image_settings
        self.video_settings = video_settings
        self.eos_token_ids = eos_token_ids
        self.preamble = preamble
        self.drawing_tokens = drawing_tokens
        prescribed = config.prescribed
        self.stops = () if prescribed is None or prescribed.stop is None else (prescribed.stop,)
        self._cuts = prescribed is not None and prescribed.cut_at_images
        named = None if prescribed is None else prescribed.image_token
        token_id = config.image_token_id if named is None or self._cuts else tokenizer.token_to_id(named)
        if self._cuts and (token_id is None or token_id >= config.decoder.vocab_size):
            token_id = 0  # nothing reads it
        token = named if self._cuts or token_id is None else tokenizer.id_to_token(token_id)
        if config.text_alone:
            token_id, token = -1, _NO_IMAGE
        if token_id is None or token is None:
            wanted = named or config.image_token_id
            raise CheckpointError(f"config.json gives images the token {wanted}, which the tokenizer does not have")
        if config.image_token_id not in (None, token_id):
            raise CheckpointError(f"config.json gives {token} the id {config.image_token_id}, the tokenizer {token_id}")
        self.image_token, self.image_token_id = token, token_id
        self.video_token: str | None = getattr(family, "VIDEO_TOKEN", None)
        place = config.image_place or token
        self._own_tokens: dict[bool, frozenset[str]] = {}
        self.chat_template = ChatTemplate(chat_template, tokenizer.special_tokens, place, self.video_token)
        markers = self.chat_template.markers
        self.marker_texts = {} if markers is None else tokenizer.special_in("".join(markers))

    def limit_tiles(self, fewest: int | None = None, most: int | None = None) -> None:
        """Cut images into other numbers of tiles than the checkpoint says; None leaves a limit as it is.

        Raises:
            CheckpointError: the family does not cut images so, or the limits make no sense.
        """
        tiles = None if self.image_settings is None else self.image_settings.tiling
        if self.image_settings is not None and isinstance(tiles, Splits | Crops | Slices):
            if fewest is not None:
                raise CheckpointError(
                    f"family '{self.config.family}' has no least number of tiles: leave --min-tiles (min_tiles) out"
                )
            limited: Splits | Crops | Slices = tiles
            if most is not None:
                limited = replace(tiles, max_crops=most) if isinstance(tiles, Crops) else replace(tiles, max_tiles=most)
            self.image_settings = replace(self.image_settings, tiling=limited)
            return
        if self.image_settings is None or not isinstance(tiles, Tiles):
            raise CheckpointError(f"family '{self.config.family}' has no limits of tiles: leave them out")
        tiles = replace(
            tiles,
            min_tiles=tiles.min_tiles if fewest is None else fewest,
            max_tiles=tiles.max_tiles if most is None else most,
        )
        self.image_settings = replace(self.image_settings, tiling=tiles)

    def limit_pixels(self, fewest: int | None = None, most: int | None = None) -> None:
        """Make images of other sizes than the checkpoint says, in pixels of height times width; None leaves a limit as
        it is.

        Raises:
            CheckpointError: the family's images have a fixed size, or the limits make no sense.
        """
        grid = None if self.image_settings is None else self.image_settings.tiling
        if self.image_settings is None or not isinstance(grid, Grid):
            raise CheckpointError(f"family '{self.config.family}' has no limits of pixels: leave them out")
        self.image_settings = replace(self.image_settings, tiling=grid.limit(fewest, most))
        if self.video_settings is not None and most is not None:
            self.video_settings = replace(self.video_settings, frame_pixels=most)

    def settings_of(self, tokens: int | None = None) -> ImageSettings | None:
        """How images are prepared that may have so many tokens at most; None: as many as the checkpoint says.

        Raises:
            PromptError: the family's images have no such limit, or not this one.
        """
        settings = self.image_settings
        if tokens is None or settings is None:
            return settings
        if not isinstance(settings.tiling, PatchGrid):
            raise PromptError(
                f"images of family '{self.config.family}' have no limit of tokens: leave image_tokens out"
            )
        return replace(settings, tiling=settings.tiling.limit_tokens(tokens))

    def answer_scale(self, size: tuple[int, int], tokens: int | None = None) -> tuple[int, int] | None:
        """Height and width of an image of `size`, height and width in pixels, in the numbers of answers that say places
        in JSON; None where these are 1000ths. `tokens`: that it may have."""
        settings = self.settings_of(tokens)
        grid = None if settings is None else settings.tiling
        if isinstance(grid, Grid) and getattr(self.family, "ANSWERS_IN_PIXELS", False):
            return grid.fit(size)
        return None

    def _prepare_video(self, video: Video) -> PreparedImage:
        token, settings = self.video_token, self.video_settings
        if token is None:
            raise PromptError(f"family '{self.config.family}' takes no videos: give some of its frames as images")
        if settings is None:
            raise CheckpointError(
                "the checkpoint has neither video_preprocessor_config.json nor preprocessor_config.json, so how it "
                "takes videos is unknown: copy the file from the original repository"
            )
        if self.tokenizer.token_to_id(token) is None:
            raise CheckpointError(f"videos need the token {token}, which the tokenizer does not have")
        if settings.grid.factor != self.config.vision.image_size:
            raise CheckpointError(
                f"the video processor makes a token of {settings.grid.factor} pixels a side, config.json of "
                f"{self.config.vision.image_size}: copy video_preprocessor_config.json from the original repository"
            )
        if not self.access.files:
            raise PromptError("videos are files, and files are not opened here: send some of its frames as images")
        family: Any = self.family
        clip = read_clip(video, settings)
        layout = family.video_layout(self.config, clip, self.image_token)
        digest = hashlib.sha256(repr((clip.size, layout)).encode() + clip.pixel_values.tobytes()).digest()
        origin = Picture(None, video.name, None, digest.hex())
        return PreparedImage(clip.pixel_values, clip.size, layout.text, digest, origin, video=video, layout=layout)

    def prepare(
        self, source: ImageSource | Picture | PreparedImage | Video, tokens: int | None = None
    ) -> PreparedImage:
        """Open an image, or a video, and make its pixels ready.

        Args:
            tokens: of an image at most, in families that take any size; None: as the checkpoint says, or as it is
                prepared already.

        Raises:
            ImageError: it cannot be opened.
            CheckpointError: the checkpoint does not say how it takes images.
            PromptError: the model takes none, or has no such limit of tokens.
        """
        if isinstance(source, PreparedImage):
            if tokens in (None, source.budget) or source.video is not None:
                return source
            return self.prepare(source.again, tokens)
        if isinstance(source, Video):
            return self._prepare_video(source)
        if self.config.text_alone:
            raise PromptError(f"family '{self.config.family}' reads text alone: leave the image out")
        if self.image_settings is None:
            raise CheckpointError(
                "the checkpoint has neither preprocessor_config.json nor an image_processor in processor_config.json, "
                "so how it takes images is unknown: copy the file from the original repository"
            )
        picture = source if isinstance(source, Picture) else read_image(source, self.access)
        settings = self.settings_of(tokens) or self.image_settings
        image = open_image(picture)
        found = replace(self._form(image, settings, picture), budget=tokens)
        return found if settings.among is None else replace(found, among=self._form(image, settings.among, picture))

    def _form(self, image: Image.Image, settings: ImageSettings, picture: Picture) -> PreparedImage:
        size = image.height, image.width
        try:
            pixels = self.family.pixels(image, settings)
            family: Any = self.family
            slices = family.slices(image, settings) if isinstance(settings.tiling, Slices) else None
        except (OverflowError, MemoryError) as error:
            raise CheckpointError(
                f"an image of {size[1]}x{size[0]} pixels cannot be made ready as the checkpoint's settings of images "
                f"say: {str(error) or 'too large'}"
            ) from None
        text = self.family.image_text(self.config, settings, self.image_token, size)
        digest = hashlib.sha256(repr(size).encode() + pixels.tobytes() + (b"" if slices is None else slices.tobytes()))
        return PreparedImage(pixels, size, text, digest.digest(), without_data(picture), slices=slices)

    def forms(self, prepared: Sequence[PreparedImage]) -> list[PreparedImage]:
        """All images of one conversation, each in the form that it takes there."""
        return [image.among or image for image in prepared] if len(prepared) > 1 else list(prepared)

    def expand(
        self,
        messages: Sequence[Message],
        prepared: Sequence[PreparedImage],
        *,
        add_generation_prompt: bool = True,
        think: bool | None = None,
    ) -> tuple[str, list[bool]]:
        """The prompt's text with an image token for every feature row, and of each whether it is an image's.

        Tokens that a message has in its own text come with a mark inside (`text.literal`), which `tokenize` reads.

        Args:
            prepared: the images of the messages, in order.
            think: whether the model is to think before it answers; None: as the template does by default.
        """
        text, *rest = self.chat_template.render(
            messages, add_generation_prompt=add_generation_prompt, controls=self._controls(), think=think
        )
        text = self.preamble + text
        slots = [False] * text.count(self.image_token)
        for number, (image, piece) in enumerate(zip(self.forms(prepared), rest, strict=True)):
            slots += [True] * image.text.count(self.image_token) + [False] * piece.count(self.image_token)
            before, behind = image.layout.around
            if text.endswith(before) and piece.startswith(behind):
                text, piece = text.removesuffix(before), piece.removeprefix(behind)
            text += image.text.replace(IMAGE_NUMBER, str(number)) + piece
        return text, slots

    def drawing_prompt(self, prompt: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of what a picture is drawn after: a user's message by the chat template, without the preamble, and
        the token after which image tokens follow; and where in `prompt` each token's text lies, (0, 0) of others.

        Raises:
            PromptError: the prompt is empty.
            CheckpointError: the model does not draw.
        """
        if self.drawing_tokens is None:
            raise CheckpointError(f"family '{self.config.family}' draws no pictures")
        words = prompt.strip()
        if not words:
            raise PromptError("the prompt is empty: say what the picture should show")
        text, probe = (
            self.chat_template.render(
                [{"role": "user", "content": [{"type": "text", "text": each}]}], controls=self._controls()
            )[0]
            for each in (words, _NO_IMAGE)
        )
        ids, places, _ = self.tokenize(text, [False] * text.count(self.image_token))
        first, lead = probe.find(_NO_IMAGE), len(prompt) - len(prompt.lstrip())
        (marked,) = mark([words], {*self._controls(), self.image_token})

        def own(start: int, end: int) -> tuple[int, int]:
            start, end = (min(max(edge - first, 0), len(marked)) for edge in (start, end))
            start, end = (len(unmark(marked[:edge])) + lead for edge in (start, end))
            return (start, end) if start < end else (0, 0)

        return [*ids, self.drawing_tokens.image], [*(own(*place) for place in places), (0, 0)]

    def _controls(self) -> frozenset[str]:
        """The tokens that are text where a message has them in its own."""
        served = not self.access.files
        if served not in self._own_tokens:
            language = getattr(self.family, "PROMPT_LANGUAGE", None)
            kept, barred = (None, language) if served else (language, None)
            template = self.chat_template.source
            self._own_tokens[served] = self.tokenizer.controls(kept, template=template, served=barred)
        return self._own_tokens[served]

    def tokenize(self, text: str, slots: Sequence[bool]) -> tuple[list[int], list[tuple[int, int]], np.ndarray]:
        """Token ids of a whole prompt as `expand` gives it, where each token's text begins and ends, and bool[L]: at
        which of them an image's features stand.

        Raises:
            PromptError: the tokenizer does not keep the image tokens as they are.
        """
        if self._cuts:
            return self._tokenize_pieces(text, slots)
        ids, offsets = self.tokenizer.encode_with_offsets(text, image_token=self.image_token)
        places = np.flatnonzero(np.array(ids) == self.image_token_id)
        if len(places) != len(slots):
            raise PromptError(f"the text has {len(slots)} times {self.image_token}, its tokens {len(places)} times")
        is_slot = np.zeros(len(ids), dtype=bool)
        is_slot[places] = slots
        return ids, offsets, is_slot

    def _tokenize_pieces(self, text: str, slots: Sequence[bool]) -> tuple[list[int], list[tuple[int, int]], np.ndarray]:
        """The same, the text between images being a prompt of its own each time, less the tokens in front of one."""
        occurrences = [match.span() for match in re.finditer(re.escape(self.image_token), text)]
        images = [span for span, is_slot in zip(occurrences, slots, strict=True) if is_slot]
        ends = [start for start, _ in images] + [len(text)]
        behind = not ends[0] and self.tokenizer.has_bos(text, self.image_token)  # the text begins behind the images
        ids, offsets = ([], []) if behind else self.tokenizer.encode_with_offsets(text[: ends[0]], image_token="")
        encode = self.tokenizer.encode_behind_images if behind else self.tokenizer.encode_piece
        is_slot = [False] * len(ids)
        for (start, end), following in zip(images, ends[1:], strict=True):
            more, places = encode(text[end:following]) if following > end else ([], [])
            ids += [self.image_token_id, *more]
            offsets += [(start, end), *((end + first, end + last) for first, last in places)]
            is_slot += [True, *[False] * len(more)]
        return ids, offsets, np.array(is_slot, dtype=bool)

    def _instruction(self, messages: Sequence[Message]) -> np.ndarray | None:
        """The last question by the Q-Former's own tokenizer, int32[L]; None where it reads none."""
        if self.instruction_tokenizer is None:
            return None
        (*_, asked) = (message for message in messages if message["role"] == "user")
        (text,) = mark([text_of(asked)], self.instruction_tokenizer.controls())
        ids, _ = self.instruction_tokenizer.encode_with_offsets(text, image_token="")
        return np.array(ids, dtype=np.int32)

    def __call__(
        self,
        prompt: Prompt,
        images: ImageSource | Sequence[ImageSource] = (),
        *,
        add_generation_prompt: bool = True,
        think: bool | None = None,
        image_tokens: int | None = None,
    ) -> Inputs:
        """Everything `model()` needs to answer a prompt, ready for prefill.

        Args:
            prompt: a text, a list of texts and images in order, or OpenAI-style messages.
            images: come before the text.
            add_generation_prompt: whether the template opens the answer.
            think: whether the model is to think before it answers; None: as the template does by default.
            image_tokens: of an image at most, where its part of a message says nothing of them; see `prepare`.

        Raises:
            PromptError: the messages do not fit the model, or its template has no switch for thinking.
            ImageError: an image cannot be opened.
        """
        messages = to_messages(prompt, images, self.access)
        parts = images_of(messages)
        if self.config.takes_one_image and len(parts) != 1:
            advice = "give each a conversation of its own" if parts else "give one"
            raise PromptError(
                f"family '{self.config.family}' answers about exactly one image, here are {len(parts)}: {advice}"
            )
        prepared = [self.prepare(part["image"], part.get("tokens", image_tokens)) for part in parts]
        text, slots = self.expand(messages, prepared, add_generation_prompt=add_generation_prompt, think=think)
        instruction = self._instruction(messages)
        read = b"" if instruction is None else instruction.tobytes()
        given = [
            InputImage(
                pixel_values=image.pixel_values,
                tokens=image.text.count(self.image_token),
                size=image.size,
                digest=hashlib.sha256(image.digest + read).digest() if read else image.digest,
                times=image.layout.times,
                instruction=instruction,
                slices=image.slices,
                budget=image.budget,
            )
            for image in self.forms(prepared)
        ]
        ids, _, is_slot = self.tokenize(text, slots)
        if not ids:
            raise PromptError("the prompt is empty: the chat template gives no text for these messages")
        written, places = np.array(ids, dtype=np.int32), np.flatnonzero(is_slot)
        rows = self.config.decoder.num_embeddings
        for token in written[~is_slot & (written >= rows)].tolist()[:1]:
            name = self.tokenizer.id_to_token(token)
            raise PromptError(
                f"the prompt has the token {name} with the id {token}, and the model has embeddings of {rows} tokens: "
                "leave it out of the text, or use the tokenizer files that belong to these weights"
            )
        video_id = None if self.video_token is None else self.tokenizer.token_to_id(self.video_token)
        for image, count in zip(prepared, (one.tokens for one in given), strict=True):
            own, places = places[:count], places[count:]
            if image.video is not None and video_id is not None:
                written[own] = video_id
        return Inputs(
            input_ids=mx.array(written)[None],
            slots=is_slot,
            images=tuple(given),
            answer_begins=answer_begins(text, self.chat_template.markers) if add_generation_prompt else "text",
        )
