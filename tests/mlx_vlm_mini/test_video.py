"""Videos: parity of Qwen2-VL, 2.5-VL and 3-VL on tests/golden/videos.npz, sampling and sizes, files, conversations."""

import json
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from checkpoints import PHOTO
from click.testing import CliRunner
from parity import check_answer
from PIL import Image
from reference import GOLDEN
from video_reference import CASES, LIMITS, NAMES, SIZE, TEMPLATE, frames, video

from mlx_vlm_mini import Chat, attend, load, stream_generate
from mlx_vlm_mini.cli.main import main
from mlx_vlm_mini.decoder.positions import PlacedImage, token_positions
from mlx_vlm_mini.errors import CheckpointError, ImageError, PromptError
from mlx_vlm_mini.families import qwen2_5_vl
from mlx_vlm_mini.images.video import Video
from mlx_vlm_mini.images.video_file import VideoFile, _upright
from mlx_vlm_mini.preprocessing.video import read_clip, video_settings


def load_for_videos(name):
    """A golden checkpoint with a chat template that knows videos, and limits that leave their frames as they are."""
    model, processor = load(GOLDEN / name)
    processor.chat_template = replace(processor.chat_template, source=TEMPLATE)
    settings = processor.video_settings
    grid = replace(settings.grid, min_pixels=LIMITS["shortest_edge"], max_pixels=100000)
    processor.video_settings = replace(settings, images=replace(settings.images, tiling=grid))
    return model, processor


@pytest.fixture(scope="module", params=NAMES)
def loaded(request):
    return request.param, *load_for_videos(request.param)


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def folder_of(count, folder, size=SIZE):
    """A folder of frames, among files that are none."""
    folder.mkdir()
    for number, frame in enumerate(frames(count, size)):
        Image.fromarray(frame).save(folder / f"frame-{number:03}.png")
    (folder / "notes.txt").write_text("no picture")
    (folder / ".hidden.png").write_text("no picture either")
    return folder


# parity and conversations


@pytest.mark.parametrize("case", sorted(CASES))
def test_parity(loaded, case):
    name, model, processor = loaded
    with np.load(GOLDEN / "videos.npz") as stored:
        expected = {what: stored[f"{name}/{case}/{what}"] for what in ("prompt_ids", "token_ids", "logprobs")}
    assert len(expected["token_ids"]) == 11
    check_answer(model, processor, CASES[case], expected)


def test_a_conversation_reads_a_video_once(loaded):
    """Each turn equals a fresh run of the whole; what the cache holds is not read again, nor after a turn taken back."""
    _, model, processor = loaded
    chat = Chat(model, processor, max_tokens=3)
    turns = [[video(5, 2.0), "What moves?"], "Where?", [PHOTO, "And here?"], [video(4, 1.0), "Or there?"]]
    cached = 0
    for number, prompt in enumerate(turns):
        if number == 3:
            chat.undo()
        held = len(chat._cache.held) if number < 3 else cached  # what turn 2 found
        chunks = list(chat.send(prompt))
        fresh = list(stream_generate(model, processor, chat.messages[:-1], max_tokens=3))
        assert [chunk.token for chunk in chunks] == [chunk.token for chunk in fresh]
        np.testing.assert_allclose([c.logprob for c in chunks], [c.logprob for c in fresh], atol=1e-4)
        stats = chunks[-1].stats
        if number:
            assert held - 12 <= stats.cached_tokens and stats.cached_tokens > 36  # three steps of 12 tokens
            cached = stats.cached_tokens
            assert stats.encoded_images == (number > 1)


def test_another_video_gets_no_old_answer(loaded):
    """A frame's hue, and in Qwen2.5-VL and 3-VL the pace, tell videos apart."""
    _, _, processor = loaded
    other = frames(4)
    other[3] = other[3][::-1]
    videos = [
        {"type": "video", "video": each, "fps": fps} for each, fps in ((frames(4), 2), (other, 2), (frames(4), 1))
    ]
    digests = [processor([each, "?"]).images[0].digest for each in videos]
    assert digests[0] != digests[1] and (digests[0] != digests[2]) == (processor.config.family != "qwen2_vl")


def test_a_folder_a_list_and_numbers_are_the_same(loaded, tmp_path):
    name, _, processor = loaded
    folder = folder_of(5, tmp_path / "frames")
    given = processor([{"type": "video", "video": str(folder), "fps": 3}, "What?"])
    for source in (folder, sorted(folder.glob("f*.png")), [Image.fromarray(frame) for frame in frames(5)]):
        inputs = processor([{"type": "video", "video": source, "fps": 3}, "What?"])
        assert (
            inputs.input_ids.tolist() == given.input_ids.tolist() and inputs.images[0].digest == given.images[0].digest
        )
    (image,) = given.images
    assert image.pixel_values.shape == (3, *SIZE, 6) and image.tokens == 36
    assert (image.pixel_values[2, ..., :3] == image.pixel_values[2, ..., 3:]).all()  # the last frame stands twice
    text = processor.tokenizer.decode(given.input_ids[0].tolist(), skip_special_tokens=False)
    assert text.count("<|video_pad|>") == 36
    if name == "qwen3-vl":
        assert "user\n<0.2 seconds><|vision_start|><|video_pad|>" in text and text.count("<|vision_start|>") == 3
        assert "<1.3 seconds>" in text and "<|vision_end|>What?" in text
    few = processor([{"type": "video", "video": folder, "max_frames": 2}, "What?"])
    assert few.images[0].tokens == 12


# positions


def test_positions_of_a_video_among_text():
    expected = [
        [0, 1, 1, 1, 1, 1, 1, 4, 4, 4, 4, 4, 4, 5, 6],
        [0, 1, 1, 1, 2, 2, 2, 1, 1, 1, 2, 2, 2, 5, 6],
        [0, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3, 5, 6],
    ]
    placed = PlacedImage(1, 2, 3, times=(0, 3))
    np.testing.assert_array_equal(token_positions([placed], 0, 15), expected)
    for start in range(15):
        np.testing.assert_array_equal(token_positions([placed], start, 15 - start), np.array(expected)[:, start:])
    assert token_positions([replace(placed, times=(0, 1))], 0, 15)[0, 12:].tolist() == [2, 4, 5]


def test_seconds_take_places():
    settings = video_settings({"patch_size": 6, "min_pixels": 1, "max_pixels": 5000}, "Qwen2VL")
    config = load_for_videos("qwen2.5-vl")[1].config
    for fps, times in ((2.0, (0, 4, 8)), (6.4, (0, 1, 2)), (100.0, (0, 0, 0)), (0.1, (0, 80, 160))):
        clip = read_clip(Video(frames(6), fps), settings)
        assert clip.interval == pytest.approx(2 / fps)
        assert qwen2_5_vl.video_layout(config, clip, "I").times == times


# sampling and sizes


@pytest.mark.parametrize(
    ("kind", "total", "rate", "video", "expected"),
    [
        ("Qwen2VL", 100, 25, Video("x"), [0, 12, 25, 37, 50, 62, 75, 87]),
        ("Qwen2VL", 9, 1, Video("x", fps=1), [0, 1, 2, 3, 4, 5, 6, 7]),
        ("Qwen2VL", 100, 25, Video("x", max_frames=5), [0, 25, 50, 75]),
        ("Qwen2VL", 10, 100, Video("x"), [0, 2, 5, 7]),
        ("Qwen2VL", 1, 25, Video("x"), [0]),
        ("Qwen2VL", 3, 25, Video("x", max_frames=1), [0, 1]),
        ("Qwen3VL", 100, 25, Video("x"), [0, 14, 28, 42, 57, 71, 85, 99]),
        ("Qwen3VL", 100, 25, Video("x", max_frames=3), [0, 50, 99]),
        ("Qwen3VL", 1, 25, Video("x"), [0]),
    ],
)
def test_frames_that_are_seen(kind, total, rate, video, expected):
    assert video_settings({}, kind).choose(total, rate, video).tolist() == expected


CHOICES = json.loads((GOLDEN / "video_choices.json").read_text())


@pytest.mark.parametrize("number", range(len(CHOICES["frames"])))
def test_frames_are_those_that_transformers_chose(number):
    case = CHOICES["frames"][number]
    settings, expected = video_settings({"max_frames": case["most"]}, case["kind"]), case["chosen"]
    found = settings.choose(case["total"], case["rate"], Video("x", fps=case["fps"])).tolist()
    # where its step is rounded up, Qwen2-VL's names a frame more, which a video may not have
    assert 0 <= len(expected) - len(found) <= (case["kind"] == "Qwen2VL") and found[-1] < case["total"]
    assert found == expected[: len(found)]


@pytest.mark.parametrize("number", range(len(CHOICES["sizes"])))
def test_sizes_are_those_that_transformers_chose(number):
    case = CHOICES["sizes"][number]
    settings = video_settings(case["options"], case["kind"])
    assert settings.fit(tuple(case["size"]), case["count"]) == tuple(case["fitted"])


def test_sizes_of_long_videos():
    """A share of the whole each, but never much less than the least; and what a caller allows."""
    two, three = video_settings({}, "Qwen2VL"), video_settings({}, "Qwen3VL")
    assert two.fit((1080, 1920), 4) == (560, 1008)
    assert two.fit((1080, 1920), 700) == (364, 672)  # 128000 tokens, 0.9 of them
    assert replace(two, cap=False).fit((1080, 1920), 700) == (560, 1008)
    assert replace(two, frame_pixels=50000).fit((1080, 1920), 4) == (140, 280)
    assert three.fit((1080, 1920), 2) == (448, 832)
    assert replace(three, frame_pixels=50000).fit((1080, 1920), 2) == (160, 288)
    assert three.fit((10, 20), 2) == (192, 384)
    with pytest.raises(ImageError, match="too long and narrow"):
        three.fit((10, 9000), 4)


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        ({"max_frames": 0}, "a whole number above 0 as max_frames, not 0"),
        ({"fps": "2"}, "a number above 0 as fps, not '2'"),
        ({"size": {"shortest_edge": 9, "longest_edge": 3}}, "9 pixels at least and 3 at most"),
    ],
)
def test_settings_that_make_no_video(hf, message):
    with pytest.raises(CheckpointError, match=message):
        video_settings(hf, "Qwen3VL")


def test_settings_have_a_file_of_their_own(tmp_path):
    folder = shutil.copytree(GOLDEN / "qwen3-vl", tmp_path / "model")
    file = folder / "video_preprocessor_config.json"
    file.write_text(json.dumps({"fps": 4, "patch_size": 6, "size": {"shortest_edge": 600, "longest_edge": 5000}}))
    settings = load(folder)[1].video_settings
    assert (settings.fps, settings.grid.max_pixels, settings.images.image_mean) == (4, 5000, (0.5, 0.5, 0.5))
    file.write_text(json.dumps({"temporal_patch_size": 3}))
    with pytest.raises(CheckpointError, match="joins 3 frames, config.json 2: copy video_preprocessor_config.json"):
        load(folder)


# files


def write_video(file, count, codec, pixel_format, rate=10):
    av = pytest.importorskip("av")
    with av.open(str(file), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = SIZE
        stream.pix_fmt = pixel_format
        for frame in frames(count):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file


def test_a_file_gives_the_frames_that_were_chosen(loaded, tmp_path):
    """Lossless, and in a container that does not count its frames."""
    _, _, processor = loaded
    file = write_video(tmp_path / "clip.mkv", 21, "ffv1", "bgr0")
    reader = VideoFile(file)
    assert (reader.total, reader.rate) == (21, 10)
    assert [np.array(frame).tolist() for frame in reader.frames([0, 7, 20])] == [
        frames(21)[i].tolist() for i in (0, 7, 20)
    ]
    chosen = processor.video_settings.choose(21, 10, Video(file)).tolist()
    assert len(chosen) == 4
    found = processor([{"type": "video", "video": file}, "What?"]).images[0]
    same = processor([{"type": "video", "video": [frames(21)[i] for i in chosen]}, "What?"]).images[0]
    np.testing.assert_array_equal(found.pixel_values, same.pixel_values)


def test_a_file_that_ends_sooner_than_it_says(tmp_path):
    reader = VideoFile(write_video(tmp_path / "clip.mp4", 12, "mpeg4", "yuv420p"))
    assert (reader.total, reader.rate) == (12, 10)
    assert len(list(reader.frames([0, 5, 11, 15, 19]))) == 5


def test_a_phone_that_was_turned():
    image = Image.new("RGB", (4, 2))
    image.putpixel((3, 0), (255, 0, 0))
    turned = _upright(SimpleNamespace(to_image=lambda: image, rotation=90))
    assert turned.size == (2, 4) and turned.getpixel((0, 0)) == (255, 0, 0)
    assert _upright(SimpleNamespace(to_image=lambda: image, rotation=0)) is image


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("text.mp4", b"no video at all", "is not a video that can be read: "),
        ("empty.mp4", b"", "is not a video that can be read: "),
        (
            "list.m3u8",
            b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
            "is not a video",
        ),
        ("list.txt", b"ffconcat version 1.0\nfile photo.jpg\n", "is not a video"),
    ],
)
def test_files_that_are_no_videos(name, data, message, tmp_path):
    pytest.importorskip("av")
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ImageError, match=message):
        VideoFile(tmp_path / name)


def test_a_file_cut_short(tmp_path):
    file = write_video(tmp_path / "clip.mkv", 21, "ffv1", "bgr0")
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(ImageError, match="clip.mkv"):
        list(VideoFile(file).frames([0, 20]))


def test_frames_that_are_too_large(tmp_path, monkeypatch):
    file = write_video(tmp_path / "clip.mkv", 3, "ffv1", "bgr0")
    monkeypatch.setattr("mlx_vlm_mini.images.video_file.MOST_PIXELS", 1000)
    with pytest.raises(ImageError, match="has frames of 48x36 pixels, and the limit is 0 million"):
        VideoFile(file)


def test_without_pyav(tmp_path, monkeypatch):
    (tmp_path / "clip.mp4").write_bytes(b"anything")
    monkeypatch.setitem(sys.modules, "av", None)
    done = run("generate", GOLDEN / "qwen2-vl", "-p", "What?", "--video", tmp_path / "clip.mp4")
    assert done.exit_code == 1
    assert done.stderr == (
        f"Error: {tmp_path}/clip.mp4 is read by PyAV, which is not installed: pip install 'mlx-vlm-mini[video]', or give "
        "a folder of its frames as pictures\n"
    )


# what is refused


def test_videos_that_are_none(loaded, tmp_path):
    _, model, processor = loaded
    empty = tmp_path / "empty"
    empty.mkdir()
    mixed = [*frames(2), *frames(1, (24, 24))]
    for source, message in (
        (tmp_path / "nothing.mp4", "video not found: .*nothing.mp4"), ("/dev/zero", "video not found: /dev/zero"),
        ("https://example.org/a.mp4", "is an address: download the video"), (empty, "empty holds no pictures"),
        ([], "the video holds no pictures"), (5, "a list of pictures, not int"), ("a\0b", "video not found"),
        (mixed, "the first of the video has 48x36 pixels, number 3 24x24"), ([tmp_path / "no.png"], "image not found"),
    ):  # fmt: skip
        with pytest.raises(ImageError, match=message):
            processor([{"type": "video", "video": source}, "What?"])
    for options, message in (({"fps": 0}, "between 0 and 1000, not 0"), ({"max_frames": 1.5}, "1 or more, not 1.5")):
        with pytest.raises(ImageError, match=message):
            processor([{**video(2, 1), **options}, "What?"])
    with pytest.raises(PromptError, match="a video part names no video"):
        processor([{"type": "video"}, "What?"])
    with pytest.raises(PromptError, match="attention is drawn on images, not on videos"):
        attend(model, processor, [video(2, 1), "What?"])
    chat = Chat(model, processor, max_tokens=1)
    list(chat.send([video(2, 1), "What?"]))
    with pytest.raises(PromptError, match="a conversation with a video is not saved"):
        chat.save(tmp_path / "talk.json")
    assert not (tmp_path / "talk.json").exists()


@pytest.mark.parametrize("name", ["llava-clip-llama", "smolvlm-whole", "gemma3-hub", "gemma3-text", "mllama-meta"])
def test_families_without_videos_say_so(name):
    _, processor = load(GOLDEN / name)
    with pytest.raises(PromptError, match=r"family '\w+' takes no videos: give some of its frames as images"):
        processor([video(2, 1), "What?"])


def test_a_template_that_knows_no_videos():
    _, processor = load(GOLDEN / "qwen2-vl")
    with pytest.raises(PromptError, match="has places for image, the messages hold video: does it know videos"):
        processor([video(2, 1), "What?"])


# commands


def test_commands(tmp_path):
    model = shutil.copytree(GOLDEN / "qwen2.5-vl", tmp_path / "model")
    (model / "chat_template.jinja").write_text(TEMPLATE)
    folder = folder_of(5, tmp_path / "frames")
    asked = ("generate", model, "-p", "What?", "--max-tokens", 2, "--video", folder)
    whole = json.loads(run(*asked, "--json").stdout)
    assert (whole["image_tokens"], whole["videos"], whole["images"]) == (36, [str(folder)], [])
    fewer = json.loads(run(*asked, "--max-frames", 3, "--fps", 1, "-i", PHOTO, "--json").stdout)
    assert fewer["image_tokens"] == 12 + 24
    small = json.loads(run(*asked, "--max-pixels", 1000, "--json").stdout)
    assert small["image_tokens"] == 3 * 6
    for wrong in (("--fps", 2), ("--video", folder, "--output", tmp_path / "out.jsonl")):
        assert run("generate", model, "-p", "What?", *wrong).exit_code == 2
    done = CliRunner().invoke(
        main, ["chat", str(model), "--video", str(folder), "--max-tokens", "2"], input="What?\nAnd?\n/stats\n"
    )
    assert done.exit_code == 0, done.stderr
    assert "cached_tokens" in done.stderr
    done = run("generate", GOLDEN / "llava-clip-llama", "-p", "What?", "--video", folder)
    assert (done.exit_code, done.stderr) == (
        1, "Error: family 'llava' takes no videos: give some of its frames as images\n",
    )  # fmt: skip
