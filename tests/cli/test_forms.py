"""--schema, --choices, --regex and --grammar of generate, chat and eval, and what they write."""

import json

import pytest
from checkpoints import PHOTO, PLAIN
from click.testing import CliRunner
from schemas import SCHEMAS

from mlx_vlm_mini import Chat
from mlx_vlm_mini.cli.forms import FormType
from mlx_vlm_mini.cli.main import main

ASK = ["generate", str(PLAIN), "-p", "Look", "-i", str(PHOTO)]


def run(*words, **options):
    return CliRunner().invoke(main, [*map(str, words)], **options)


@pytest.fixture
def schema(tmp_path):
    file = tmp_path / "schema.json"
    file.write_text("\ufeff" + json.dumps(SCHEMAS["constants"]))
    return file


def test_an_answer_and_its_object(schema):
    text = '{"kind":"receipt","version":3}'
    said = run(*ASK, "--schema", schema)
    assert (said.exit_code, said.stdout) == (0, f"{text}\n")
    found = json.loads(run(*ASK, "--schema", schema, "--json").stdout)
    assert (found["text"], found["object"], found["finish_reason"]) == (text, json.loads(text), "stop")
    cut = json.loads(run(*ASK, "--schema", schema, "--json", "--max-tokens", 3).stdout)
    assert "object" not in cut and cut["finish_reason"] == "length" and text.startswith(cut["text"])


def test_lines_of_output_have_the_object_beside_the_text(schema, tmp_path):
    file = tmp_path / "answers.jsonl"
    asked = [*ASK, "--schema", schema, "--output", file]
    assert run(*asked).exit_code == 0
    (line,) = map(json.loads, file.read_text().splitlines())
    assert line["object"] == json.loads(line["text"])
    assert run(*asked).exit_code == 0 and len(file.read_text().splitlines()) == 1  # it is there already
    schema.write_text(json.dumps(SCHEMAS["enums"]))
    assert run(*asked).exit_code == 0  # another form is another question
    *_, line = map(json.loads, file.read_text().splitlines())
    assert line["object"]["shape"] in ("circle", "square", "star")


def test_choices_and_their_probabilities(tmp_path):
    said = run(*ASK, "--choices", 'yes, no ,"not, at all"')
    assert said.stdout.strip() in ("yes", "no", "not, at all")
    found = json.loads(run(*ASK, "--choices", "yes,no", "--json").stdout)
    assert [each["text"] for each in found["choices"]] == ["yes", "no"] and found["text"] in ("yes", "no")
    assert sum(each["probability"] for each in found["choices"]) == pytest.approx(1)
    assert all(each["logprob"] < 0 for each in found["choices"])
    file = tmp_path / "answers.jsonl"
    run(*ASK, "--choices", "yes,no", "--output", file)
    (line,) = map(json.loads, file.read_text().splitlines())
    for one, other in zip(line["choices"], found["choices"], strict=True):
        assert one["probability"] == pytest.approx(other["probability"], abs=1e-4)


def test_a_regular_expression_and_a_grammar(tmp_path):
    assert run(*ASK, "--regex", "[0-9]{2}").stdout.strip().isdigit()
    file = tmp_path / "sum.lark"
    file.write_text('start: "1" ("+" "1")~2')
    assert run(*ASK, "--grammar", file).stdout == "1+1+1\n"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--schema", "none.json"], 1, "cannot read the schema none.json: No such file or directory"),
        (["--grammar", "."], 1, "cannot read the grammar .: Is a directory"),
        (["--schema", "bad.json"], 1, "the schema is no JSON"),
        (["--schema", "not.json"], 1, 'the schema at #/properties/a cannot be followed: the keyword "not"'),
        (["--choices", "a,,b"], 1, "choice 2 is empty: leave it out"),
        (["--choices", ""], 1, "there must be 1 to 10,000 choices, not 0"),
        (["--choices", "a,a"], 1, "the choice 'a' stands twice"),
        (["--regex", "(("], 1, "the regex cannot be followed: unclosed group"),
        (["--regex", "a", "--choices", "b"], 2, "an answer has one form: give --choices or --regex"),
    ],
)
def test_what_is_refused_before_a_model_is_loaded(words, code, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "not.json").write_text('{"properties": {"a": {"not": {}}}}')
    for command in ("generate", "chat"):
        result = run(command, "nowhere/nothing", *(["-p", "Hi"] if command == "generate" else []), *words)
        assert result.exit_code == code and said in result.stderr
        assert len(result.stderr.splitlines()) == 1 or code == 2


def test_a_conversation(schema, llava):
    typed = (
        f"Hi\n/set choices this,that\nWhich?\n/set\n/set schema {schema}\nAnd?\n/set schema none\n/set regex ((\nOh?\n"
    )
    said = run("chat", PLAIN, "--regex", "[0-9]", "--max-tokens", 30, input=typed)
    first, second, third, last = said.stdout.splitlines()
    assert first.isdigit() and second in ("this", "that") and third == '{"kind":"receipt","version":3}'
    assert last not in ("this", "that", third)
    assert "choices this,that" in said.stderr and "regex                none" in said.stderr
    assert "the regex cannot be followed: unclosed group" in said.stderr


def test_what_is_saved(llava, tmp_path):
    for options in ({"schema": SCHEMAS["tree"]}, {"choices": ["a", "b"]}, {"regex": "a+"}, {"grammar": 'start: "a"'}):
        chat = Chat(*llava, max_tokens=4, **options)
        list(chat.send("Hi"))
        chat.save(tmp_path / "talk.json")
        assert Chat.load(tmp_path / "talk.json", *llava).options == {"max_tokens": 4, **options}


def test_eval_among_choices(tmp_path):
    file = tmp_path / "data.jsonl"
    said = [{"role": "user", "content": "Is it so?"}, {"role": "assistant", "content": "yes"}]
    file.write_text(json.dumps({"messages": said}) + "\n")
    for choices, right in (("yes", 1), ("no", 0)):
        found = json.loads(run("eval", PLAIN, "--data", file, "--choices", choices, "--no-blank", "--json").stdout)
        assert found["all"]["right"] == right
    free = json.loads(run("eval", PLAIN, "--data", file, "--no-blank", "--json").stdout)
    assert free["all"]["right"] == 0


def test_what_is_read_once_stays_as_it_is():
    """click converts defaults and what `/set` has converted again."""
    assert FormType("choices").convert(["a", "b"], None, None) == ["a", "b"]
    assert FormType("choices").convert('a, "b ""c"""', None, None) == ["a", 'b "c"']
