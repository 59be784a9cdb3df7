"""Messages, chat templates and slots."""

import json

import numpy as np
import pytest
from checkpoints import PHOTO, PLAIN, SHAPES, edit_json
from PIL import Image

from mlx_vlm_mini import load
from mlx_vlm_mini.errors import CheckpointError, PromptError
from mlx_vlm_mini.text.messages import images_of, to_messages
from mlx_vlm_mini.text.template import ChatTemplate, find_chat_template

PARTS = "{% for m in messages %}{% for p in m.content %}{{ '<image>' if p.type == 'image' else p.text }}{% endfor %};{% endfor %}"
TEXT = "{% for m in messages %}{{ m.role + ': ' + m.content }};{% endfor %}"
BOTH = (
    "{% for m in messages %}{% if m.content is string %}({{ m.content }}){% else %}{% for p in m.content %}"
    "{{ '<image>' if p.type == 'image' else '[' + p.text + ']' }}{% endfor %}{% endif %}{% endfor %}"
)


def template(source: str, **variables: str) -> ChatTemplate:
    return ChatTemplate(source, variables, "<image>")


def rendered(source: str, messages: list[dict], **variables: str) -> str:
    return "<image>".join(template(source, **variables).render(messages))


def user(*parts: object) -> list[dict]:
    return to_messages([{"role": "user", "content": list(parts)}])


def test_every_form_of_prompt_means_the_same():
    expected = [{"role": "user", "content": [{"type": "image", "image": PHOTO}, {"type": "text", "text": "What?"}]}]
    image_url = {"type": "image_url", "image_url": {"url": PHOTO}}
    assert to_messages("What?", [PHOTO]) == expected
    assert to_messages([PHOTO, "What?"]) == expected
    assert user({"type": "image", "image": PHOTO}, {"type": "text", "text": "What?"}) == expected
    assert user({"type": "image", "path": PHOTO}, "What?") == expected
    placeholder = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    assert to_messages(placeholder, [PHOTO]) == expected
    with pytest.raises(PromptError, match="no url"):
        user(image_url)
    image_url["image_url"]["url"] = "https://example.org/a.png"
    assert user(image_url, "What?")[0]["content"][0] == {"type": "image", "image": "https://example.org/a.png"}
    assert user({"type": "image_url", "image_url": "data:,"})[0]["content"][0]["image"] == "data:,"


def test_a_text_in_a_list_is_never_taken_for_a_path():
    assert images_of(to_messages([str(PHOTO), " is a file name"])) == []


@pytest.mark.parametrize(
    ("prompt", "images", "message"),
    [
        ("", [], "the prompt is empty"),
        ("  \n", [], "the prompt is empty"),
        ([], [], "the prompt is empty"),
        ([{"role": "user", "content": ""}], [], "the prompt is empty"),
        ([{"role": "user"}], [], "user message has no content"),
        ([{"role": "user", "content": [{"type": "audio"}]}], [], "'audio' is not supported"),
        ([{"role": "user", "content": [{"type": "video"}]}], [], "a video part names no video"),
        ([{"role": "user", "content": [{"type": "image"}]}], [], "names no image"),
        ([{"role": "user", "content": "x"}], [PHOTO], "1 of 1 images have no place"),
    ],
)
def test_prompts_that_say_nothing(prompt, images, message):
    with pytest.raises(PromptError, match=message):
        to_messages(prompt, images)


def test_templates_for_parts_for_texts_and_for_both():
    messages = user({"type": "image", "image": PHOTO}, "Hi")
    assert rendered(PARTS, messages) == "<image>Hi;"
    assert rendered(TEXT, messages) == "user: <image>\nHi;"
    assert rendered(BOTH, messages) == "<image>[Hi]"
    plain = to_messages([{"role": "user", "content": "Hi"}])
    assert rendered(PARTS, plain) == "Hi;"
    assert rendered(TEXT, plain) == "user: Hi;"
    assert rendered(BOTH, plain) == "(Hi)"


def test_what_templates_may_use():
    source = (
        "{{ bos_token }}{% for m in messages %}{% generation %}{{ m.content[0].text }}{% endgeneration %}"
        "{% if loop.last %}{% break %}{% endif %}{% endfor %}{{ {'ä': 1} | tojson }}"
        "{{ strftime_now('%Y') | length }}{% if add_generation_prompt %}>{% endif %}"
    )
    assert rendered(source, user("Hi"), bos_token="<s>") == '<s>Hi{"ä": 1}4>'


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_the_sandbox_holds(attack):
    with pytest.raises(PromptError, match="refuses"):
        template(attack).render(user("Hi"))


def test_a_template_that_refuses_says_why():
    source = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(PromptError, match="refuses these messages: roles must alternate"):
        template(source).render(user("Hi"))
    with pytest.raises(CheckpointError, match="the chat template is broken"):
        template("{% for %}")


def test_more_images_than_the_template_has_room_for():
    first_only = (
        "{% for m in messages %}<image>{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}{% endfor %}"
    )
    messages = user({"type": "image", "image": PHOTO}, {"type": "image", "image": SHAPES}, "Hi")
    with pytest.raises(PromptError, match="1 places for an image .*2 images"):
        template(first_only).render(messages)


def test_an_image_token_in_the_text_is_no_image(llava):
    _, processor = llava
    assert not processor("What does <image> mean?").slots.any()
    inputs = processor("What does <image> mean?", [PHOTO])
    assert inputs.slots.sum() == (np.array(inputs.input_ids) == processor.image_token_id).sum()
    assert inputs.slots.sum() == processor("What?", [PHOTO]).slots.sum()


def test_text_that_is_no_text(llava):
    with pytest.raises(PromptError, match="not valid UTF-8"):
        llava[1]("a\udcff")


def test_a_template_that_calls_itself():
    with pytest.raises(CheckpointError, match="never ends"):
        template("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}").render(user("Hi"))


def test_slots_and_features_must_agree(llava):
    model, processor = llava
    inputs = processor("Hi", [PHOTO])
    assert int(inputs.slots.sum()) == model.config.vision.num_features
    object.__setattr__(inputs, "slots", inputs.slots.copy())
    inputs.slots[np.flatnonzero(inputs.slots)[0]] = False
    with pytest.raises(PromptError, match="the prompt has 8 image tokens, the images give 9"):
        model(inputs)


def test_the_files_a_template_can_come_from(copy_of):
    folder = copy_of()  # has chat_template.json
    original = find_chat_template(folder)
    assert original is not None and original == json.loads((PLAIN / "chat_template.json").read_text())["chat_template"]
    edit_json(folder / "tokenizer_config.json", chat_template="from tokenizer_config")
    assert find_chat_template(folder) == original
    (folder / "chat_template.jinja").write_text("from jinja")
    assert find_chat_template(folder) == "from jinja"
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").unlink()
    assert find_chat_template(folder) == "from tokenizer_config"
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    edit_json(folder / "tokenizer_config.json", chat_template=named)
    assert find_chat_template(folder) == "yes"
    for names in (("rag", "chat"), ("chat", "rag"), ("rag",)):
        named = {name: f"for {name}" for name in names}
        edit_json(folder / "tokenizer_config.json", chat_template=named)
        assert find_chat_template(folder) == ("for chat" if "chat" in names else "for rag")
    edit_json(folder / "tokenizer_config.json", chat_template=...)
    assert find_chat_template(folder) is None


def test_without_a_template_the_family_has_one(copy_of):
    folder = copy_of()
    (folder / "chat_template.json").unlink()
    _, processor = load(folder)
    messages = to_messages(["See ", Image.new("RGB", (4, 4)), "this"])
    assert processor.chat_template.render(messages) == ["USER: See  ", "\nthis ASSISTANT:"]


def test_answers_and_system_messages_that_a_template_takes_as_texts():
    """Pixtral-12B's adds them to texts of its own, and takes a question in parts."""
    source = (
        "{% for m in messages %}{% if m.role == 'user' %}[{% for p in m.content %}{{ '<image>' if p.type == 'image' else p.text }}"
        "{% endfor %}]{% else %}{{ m.content + ';' }}{% endif %}{% endfor %}"
    )
    template = ChatTemplate(source, {}, "<image>")
    text = [{"type": "text", "text": "Be brief"}]
    said = [{"role": role, "content": text} for role in ("system", "user", "assistant", "user")]
    assert template.render(said) == ["Be brief;[Be brief]Be brief;[Be brief]"]
    assert ChatTemplate(PARTS, {}, "<image>").render(said) == ["Be brief;" * 4]


@pytest.mark.parametrize(
    "images",
    [np.zeros((6, 8, 3), np.uint8), Image.new("RGB", (8, 6)), PHOTO, str(PHOTO), PHOTO.read_bytes()],
    ids=lambda images: type(images).__name__,
)
def test_one_image_stands_for_a_list_of_it(images):
    (part,) = images_of(to_messages("What?", images))
    assert part["image"] is images
    assert len(images_of(to_messages("What?", [images, images]))) == 2


def test_images_of_a_message_in_ollamas_form():
    (message,) = to_messages([{"role": "user", "content": "What?", "images": ["a.png", "b.png"]}])
    assert [part.get("image", part.get("text")) for part in message["content"]] == ["a.png", "b.png", "What?"]
    parts = [{"type": "text", "text": "See"}, {"type": "image"}]
    (message,) = to_messages([{"role": "user", "content": parts, "images": ["a.png"]}])
    assert message["content"][1] == {"type": "image", "image": "a.png"}
    with pytest.raises(PromptError, match="1 of the user message's images have no place in it"):
        to_messages([{"role": "user", "content": parts, "images": ["a.png", "b.png"]}])


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"role": "user", "content": "hi", "tool_calls": [1]}, "the user message has 'tool_calls', which is not known"),
        ({"role": "user", "content": [{"type": "text", "text": "hi", "cache": 1}]}, "the text part has 'cache'"),
        (
            {"role": "user", "content": [{"type": "image", "image": "a", "detail": "low"}]},
            "the image part has 'detail'",
        ),
        ({"role": "user", "content": "hi", "x": np.zeros(2)}, "the user message has 'x', which is not known"),
        ({"role": "user", "content": [{"type": np.zeros(2)}]}, "has no type that is a text"),
        ({"role": "user", "content": [{"type": None}]}, "has no type that is a text"),
    ],
)
def test_unknown_keys_are_refused_by_name(message, said):
    with pytest.raises(PromptError, match=said) as error:
        to_messages([message])
    assert str(error.value).isprintable()


def test_keys_that_say_nothing_are_passed_over():
    """As data sets and other programs write them."""
    part = {"type": "text", "text": "hi", "image": None}
    assert to_messages([{"role": "user", "content": [part], "tool_calls": None, "refusal": None, "images": []}])
