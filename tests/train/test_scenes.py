"""Scenes and questions: pictures show what is said of them, and every question has one right answer."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlx_vlm_mini.data import scenes as scenes_module
from mlx_vlm_mini.data.questions import Asker, write_scenes
from mlx_vlm_mini.data.scenes import (
    COLORS,
    SHAPES,
    SIZES,
    Digit,
    Scene,
    Thing,
    draw,
    draw_digit,
    random_close_up,
    random_digit,
    random_scene,
)
from mlx_vlm_mini.errors import VLMError

TWO = Scene(
    (Thing("circle", "red", "large", 0.3, 0.3, 0.21), Thing("square", "blue", "small", 1.5, 0.8, 0.12)),
    200, 100, (128,) * 3, 0.0,
)  # fmt: skip


def asker(*seed: int) -> Asker:
    return Asker(np.random.default_rng(seed))


def test_a_scene_is_described_as_it_is_drawn():
    said = "A large red circle at the top left and a small blue square at the bottom right."
    assert asker(0).describe(TWO)[1] == said
    pixels = np.asarray(draw(TWO, np.random.default_rng(0))).astype(int)
    assert pixels.shape == (100, 200, 3)
    assert np.abs(pixels[30, 30] - (214, 40, 40)).max() < 40 and np.abs(pixels[80, 150] - (36, 90, 214)).max() < 40
    assert pixels[5, 195].tolist() == [128, 128, 128]


def test_shapes_cover_their_share_of_the_picture():
    """Areas, in squared radii, of what is drawn: a circle of 0.9, a square's corners at 1, and so on."""
    for shape, area in {"circle": np.pi * 0.81, "square": 2.0, "triangle": 3**0.5 * 0.75, "star": 1.234}.items():
        scene = Scene((Thing(shape, "white", "large", 0.5, 0.5, SIZES["large"]),), 400, 400, (0, 0, 0), 0.0)
        image = np.asarray(draw(scene, np.random.default_rng(1))).astype(float)[..., 0]
        assert image.sum() / image.max() / (SIZES["large"] * 400) ** 2 == pytest.approx(area, rel=0.02), shape


@pytest.mark.parametrize("number", range(20))
def test_close_ups_fill_their_picture_and_are_asked_nothing_of_size_and_place(number):
    rng = np.random.default_rng([7, number])
    scene = random_close_up(rng, radii=(0.2, 0.45) if number % 2 else (0.35, 0.36))
    (thing,) = scene.things
    side = min(scene.width, scene.height)
    assert 0.2 <= thing.radius <= 0.45 if number % 2 else 0.35 <= thing.radius <= 0.36
    assert thing.radius <= thing.x <= scene.width / side - thing.radius
    pixels = np.asarray(draw(scene, rng)).astype(float)
    painted = np.linalg.norm(pixels - COLORS[thing.color], axis=-1) < 45
    area = {"circle": np.pi * 0.81, "square": 2.0, "triangle": 3**0.5 * 0.75, "star": 1.234}[thing.shape]
    assert painted.mean() == pytest.approx(area * (thing.radius * side) ** 2 / painted.size, rel=0.15)
    for kind, [(question, answer)] in Asker(rng).about_close_up(scene):
        right = {"describe": thing.name, "colour": thing.color, "shape": thing.shape}.get(kind)
        if right is None:
            assert answer == ("Yes." if f"{thing.name}?" in question or f"{thing.name} here" in question else "No.")
        else:
            assert answer.lower().removesuffix(".").removeprefix("an ").removeprefix("a ") == right


@pytest.mark.parametrize("number", range(100))
def test_questions_about_one_picture_have_one_right_answer(number):
    """Answers are checked against the scene by another way than the one that made them."""
    rng = np.random.default_rng([9, number])
    scene = random_scene(rng)
    words = [thing.name.split() for thing in scene.things]
    kinds = set()
    for kind, exchange in Asker(rng).about(scene):
        question, answer = exchange[-1]
        asked = question.strip("?.").split()
        kinds.add(kind)
        assert len(exchange) == (2 if kind == "follow-up" else 1)
        if kind == "colour":
            (color,) = (color for color, shape in words if shape in asked)
            assert answer == f"{color.capitalize()}."
        if kind == "presence":
            named = {*SHAPES, *COLORS} & set(asked)
            there = any(named <= {color, shape} for color, shape in words)
            assert answer == ("Yes." if there else "No.")
        if kind == "count":
            of = [shape for _, shape in words if f"{shape}s" in asked]
            of = words if "objects" in asked or "things" in asked else of
            assert answer == ["Zero.", "One.", "Two.", "Three.", "Four."][len(of)]
        if kind == "where":
            (thing,) = (thing for thing in scene.things if thing.shape in asked or thing.color in asked)
            x, y = thing.x * min(scene.width, scene.height), thing.y * min(scene.width, scene.height)
            assert ("left" in answer) == (3 * x < scene.width) and ("right" in answer) == (3 * x > 2 * scene.width)
            assert ("top" in answer) == (3 * y < scene.height) and ("bottom" in answer) == (3 * y > 2 * scene.height)
        if kind == "follow-up":
            assert "it" in asked or "its" in asked
            (thing,) = (thing for thing in scene.things if thing.shape in exchange[0][0])
            assert answer.strip(".").lower() in (thing.color, thing.size, scene.place(thing))
    assert {"describe", "count", "shape", "presence"} & kinds >= {"describe", "count", "presence"}


@pytest.mark.parametrize("number", range(60))
def test_comparisons_have_one_right_answer(number):
    rng = np.random.default_rng([8, number])
    first, second = random_scene(rng), random_scene(rng)
    for kind, ((question, answer),) in Asker(rng).compare(first, second):
        assert kind == "compare"
        asked = question.strip("?.").split()
        if "more" in asked:
            larger = np.sign(len(first.things) - len(second.things))
            assert answer == {1: "The first.", -1: "The second.", 0: "Neither."}[larger]
        elif asked[0] in ("Which", "In") and "colour" not in asked:
            has = [
                any(all(word in asked for word in thing.name.split() if word in question) for thing in shown
                    if thing.shape in asked or ("object" in asked and thing.color in asked))
                for shown in (first.things, second.things)
            ]  # fmt: skip
            exact = len({*asked} & {*scenes_module.COLORS}) and len({*asked} & {*scenes_module.SHAPES})
            if exact:
                has = [any({*thing.name.split()} <= {*asked} for thing in each.things) for each in (first, second)]
            assert (
                answer == {(1, 1): "Both.", (1, 0): "The first.", (0, 1): "The second.", (0, 0): "Neither."}[tuple(has)]
            )
        else:
            scene = first if "first" in asked else second
            if "objects" in asked:
                assert answer == ["One.", "Two.", "Three.", "Four."][len(scene.things) - 1]
            else:
                (thing,) = (thing for thing in scene.things if thing.shape in asked)
                assert answer == f"{thing.color.capitalize()}."


def test_things_do_not_overlap_and_stand_in_reading_order():
    for number in range(100):
        scene = random_scene(np.random.default_rng([3, number]))
        side = min(scene.width, scene.height)
        for i, one in enumerate(scene.things):
            radius = SIZES[one.size]
            assert radius <= one.x <= scene.width / side - radius and radius <= one.y <= scene.height / side - radius
            for other in scene.things[:i]:
                assert np.hypot(one.x - other.x, one.y - other.y) > radius + SIZES[other.size]
                assert scene.cell(other) <= scene.cell(one)


def test_digits_of_tests_are_never_trained_on():
    seen = [
        {random_digit(np.random.default_rng([way, number]), held_out=bool(way)).grid.tobytes() for number in range(400)}
        for way in (0, 1)
    ]
    assert len(seen[0]) > 250 and len(seen[1]) > 250 and len(seen[0] & seen[1]) <= 1  # two writers may write the same


def test_a_digit_is_drawn_where_its_ink_is():
    grid = np.zeros((8, 8))
    grid[3:5, 3:5] = 1
    image = np.asarray(draw_digit(Digit(0, grid, 80, 80), np.random.default_rng(0))).astype(int)
    corner, ink = image[0, 0], image[np.abs(image - image[0, 0]).sum(-1) > 200]
    assert 100 < len(ink) < 900 and np.abs(ink.mean(axis=0) - corner).min() > 100


def test_without_scikit_learn_one_line_says_so(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    scenes_module._digits.cache_clear()
    with pytest.raises(VLMError, match="pip install scikit-learn"):
        random_digit(np.random.default_rng(0), held_out=False)


@pytest.fixture(scope="module")
def train(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, 40, seed=1)
    return folder


def test_a_longer_set_begins_with_a_shorter_one(tmp_path, train):
    write_scenes(tmp_path, 50, seed=1)
    assert (tmp_path / "scenes.jsonl").read_text().startswith((train / "scenes.jsonl").read_text())
    for file in (train / "images").iterdir():
        assert file.read_bytes() == (tmp_path / "images" / file.name).read_bytes()


def test_a_part_of_a_set_is_a_set(tmp_path, train):
    write_scenes(tmp_path, 10, seed=1, first=30)
    assert (tmp_path / "scenes.jsonl").read_text().splitlines() == (train / "scenes.jsonl").read_text().splitlines()[
        30:
    ]


def test_dialogues_vary_and_a_lone_question_is_nothing_new(train):
    lines = [json.loads(line) for line in (train / "scenes.jsonl").read_text().splitlines()]
    turns = [len(line["messages"]) // 2 for line in lines]
    assert turns.count(1) + turns.count(2) >= 3 and max(turns) >= 6
    pictures = [sum(part["type"] == "image" for part in line["messages"][0]["content"]) for line in lines]
    assert set(pictures) == {1, 2}
    for line in lines:
        for part in line["messages"][0]["content"]:
            if part["type"] == "image":
                with Image.open(train / part["image"]) as image:
                    assert min(image.size) >= 64 and max(image.size) <= 192


def test_a_test_asks_one_question_of_each_kind_equally_often(tmp_path):
    write_scenes(tmp_path, 120, seed=4, pairs=0.0, test=True)
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "scenes.jsonl").read_text().splitlines()]
    share = {kind: kinds.count(kind) / 120 for kind in set(kinds)}
    assert set(share) == {"describe", "count", "colour", "where", "size", "follow-up", "shape", "presence"}
    assert all(0.05 < value < 0.25 for value in share.values()), share


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"close": 0.5, "radii": (0.45, 0.2)}, "radii go from the smallest to the largest"),
        ({"close": 0.5, "radii": (0.2, 0.6)}, "up to 0.5"),
        ({"digits": 0.5, "pairs": 0.3, "close": 0.3}, "more than all lines"),
    ],
)
def test_sets_that_cannot_be_are_refused_before_anything_is_written(options, message, tmp_path):
    with pytest.raises(VLMError, match=message):
        write_scenes(tmp_path / "out", 2, seed=1, **options)
    assert not (tmp_path / "out").exists()
