"""Hub names, against a stand-in of the Hub's HTTP interface on loopback."""

import json
import shutil

import numpy as np
import pytest
from checkpoints import PHOTO, PLAIN, random_mask_decoder
from hub import COMMIT
from reference import GOLDEN

from mlx_vlm_mini.grounding.mask_decoder import ADDRESS, FILE

NAME, SHARDED = "tiny/llava", "tiny/llava-in-shards"
ASK = ("-p", "What is in this image?", "-i", PHOTO, "--max-tokens", 10, "--json")


def test_a_hub_name_is_downloaded_once_and_only_what_is_needed(hub):
    kind, run = hub
    with np.load(PLAIN / "expected.npz") as expected:
        tokens = expected["image/token_ids"].tolist()
    first = run("generate", NAME, *ASK)
    assert first.returncode == 0, first.stderr
    assert json.loads(first.stdout)["token_ids"] == tokens
    fetched = {path.rpartition("/")[2] for method, path, _ in kind.requests if method == "GET" and "/resolve/" in path}
    assert "model.safetensors" in fetched
    assert not fetched & {"modeling_evil.py", "pytorch_model.bin", "expected.npz"}
    kind.requests.clear()
    assert json.loads(run("generate", NAME, *ASK).stdout)["token_ids"] == tokens
    assert not [path for method, path, _ in kind.requests if method == "GET" and "/resolve/" in path]
    kind.requests.clear()
    assert json.loads(run("generate", NAME, *ASK, HF_HUB_OFFLINE="1").stdout)["token_ids"] == tokens
    assert kind.requests == []


def test_a_revision(hub):
    _, run = hub
    assert run("generate", NAME, *ASK, "--revision", COMMIT).returncode == 0
    failed = run("generate", NAME, *ASK, "--revision", "nope")
    assert failed.returncode == 1 and f"{NAME} has no revision 'nope' on the Hub" in failed.stderr


@pytest.mark.parametrize("name", [NAME, SHARDED])
def test_info_of_a_hub_model_reads_headers_only(hub, name):
    kind, run = hub
    described = run("info", name, "--check", "--json")
    assert described.returncode == 0, described.stderr
    local = run("info", kind.folders[name], "--check", "--json")
    assert {**json.loads(described.stdout), "model": ""} == {**json.loads(local.stdout), "model": ""}
    weights = [request for request in kind.requests if request[0] == "GET" and "safetensors" in request[1]]
    assert weights and all(wanted for _, path, wanted in weights if not path.endswith(".json"))


def test_convert_from_the_hub(hub, tmp_path):
    _, run = hub
    assert run("convert", NAME, "out").returncode == 0
    assert run("generate", tmp_path / "out", *ASK, HF_HUB_OFFLINE="1").returncode == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [("tiny/none", "is neither a folder here nor a public model"), ("meta/secret", "is gated: accept its terms")],
)
def test_models_that_the_hub_does_not_give(hub, name, message):
    _, run = hub
    for command in (["generate", name, "-p", "x"], ["info", name]):
        failed = run(*command)
        assert failed.returncode == 1 and failed.stdout == ""
        assert failed.stderr.startswith(f"Error: {name} {message}") and failed.stderr.count("\n") == 1


def test_no_network(hub):
    _, run = hub
    for environment in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        failed = run("generate", NAME, "-p", "x", **environment)
        assert failed.returncode == 1 and failed.stderr.count("\n") == 1
        assert "nor in the Hub's cache, and the Hub cannot be reached" in failed.stderr


def test_no_network_and_half_of_a_model(hub):
    _, run = hub
    assert run("info", NAME).returncode == 0
    for command in (["generate", NAME, "-p", "x"], ["info", NAME, "--check"]):
        failed = run(*command, HF_HUB_OFFLINE="1")
        assert failed.returncode == 1 and failed.stderr == (
            f"Error: {NAME} is in the Hub's cache in part alone, and the Hub cannot be reached for the rest\n"
        )


def test_one_file_by_its_address(hub, tmp_path):
    """The mask decoder, of a Space; asked for in a process of its own, whose Hub is the stand-in."""
    kind, run = hub
    kind.folders["big-vision/paligemma-hf"] = tmp_path / "space"
    (tmp_path / "space").mkdir()
    random_mask_decoder(tmp_path / "space" / FILE)
    ask = ("generate", PLAIN, *ASK, "--draw", "out.png", "--mask-decoder")
    done = run(*ask, ADDRESS)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "the answer names no boxes: out.png is the image as it was\n"
    assert f"/spaces/big-vision/paligemma-hf/resolve/main/{FILE}" in {path for _, path, _ in kind.requests}
    assert run(*ask, ADDRESS, HF_HUB_OFFLINE="1").returncode == 0
    refused = run(*ask, ADDRESS.replace(FILE, "no.npz"))
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1, refused.stderr


def test_the_second_tokenizer_of_instructblip_is_fetched(hub):
    kind, run = hub
    kind.folders["tiny/instructblip"] = GOLDEN / "instructblip-vicuna"
    with np.load(GOLDEN / "instructblip-vicuna" / "expected.npz") as expected:
        tokens = expected["image/token_ids"].tolist()
    said = run("generate", "tiny/instructblip", *ASK)
    assert said.returncode == 0, said.stderr
    assert json.loads(said.stdout)["token_ids"] == tokens
    assert run("info", "tiny/instructblip", "--check").returncode == 0


@pytest.mark.parametrize("shards", ["weights.safetensors", "model.safetensors", "model-00001-of-00001.safetensors"])
def test_an_index_on_the_hub_that_is_stale_or_names_other_files(hub, tmp_path, shards):
    kind, run = hub
    folder = kind.folders["tiny/other"] = tmp_path / "other"
    shutil.copytree(PLAIN, folder)
    (folder / "model.safetensors").rename(folder / shards)
    named = shards if shards.startswith("weights") else "model-00001-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": named}}))
    assert run("info", "tiny/other", "--check").returncode == 0
    assert not list((tmp_path / "cache").rglob(shards))
    said = run("generate", "tiny/other", *ASK)
    assert said.returncode == 0, said.stderr
    again = run("generate", "tiny/other", *ASK, HF_HUB_OFFLINE="1")
    assert json.loads(again.stdout)["token_ids"] == json.loads(said.stdout)["token_ids"]


@pytest.mark.parametrize(
    "name",
    [
        "tiny/many/4bit",
        "https://huggingface.co/tiny/many/tree/main/4bit",
        f"https://hf.co/tiny/many/tree/{COMMIT}/4bit",
    ],
)
def test_a_folder_inside_a_repository(hub, tmp_path, name):
    kind, run = hub
    kind.folders["tiny/many"] = tmp_path / "many"
    shutil.copytree(PLAIN, tmp_path / "many" / "4bit")
    shutil.copytree(PLAIN, tmp_path / "many" / "8bit")
    assert run("info", name, "--check").returncode == 0
    said, same = run("generate", name, *ASK), run("generate", NAME, *ASK)
    assert said.returncode == 0, said.stderr
    assert json.loads(said.stdout)["token_ids"] == json.loads(same.stdout)["token_ids"]
    assert run("convert", name, "out").returncode == 0
    assert json.loads((tmp_path / "out" / "conversion.json").read_text())["source"]["revision"] == COMMIT
    assert not [path for _, path, _ in kind.requests if "8bit" in path and "/resolve/" in path]


def test_the_address_of_a_page(hub):
    _kind, run = hub
    said, same = (run("generate", name, *ASK) for name in (f"https://huggingface.co/{NAME}", NAME))
    assert said.returncode == 0, said.stderr
    assert json.loads(said.stdout)["token_ids"] == json.loads(same.stdout)["token_ids"]
    failed = run("generate", f"https://huggingface.co/{NAME}/blob/main/config.json", *ASK)
    assert failed.returncode == 1 and "is no model's page: give owner/model" in failed.stderr


def test_small_files_are_fetched_by_name_and_up_to_a_size(hub, tmp_path):
    """A repository may hold as many files as it likes, and of any size."""
    kind, run = hub
    folder = kind.folders[NAME]
    for number in range(20):
        (folder / f"results-{number}.json").write_text("{}")
    assert run("info", NAME).returncode == 0
    assert not [path for _, path, _ in kind.requests if "results-" in path and "/resolve/" in path]
    kind.folders["tiny/huge"] = tmp_path / "huge"
    shutil.copytree(PLAIN, tmp_path / "huge")
    with (tmp_path / "huge" / "vocab.txt").open("wb") as stream:
        stream.truncate(200 * 2**20)
    kind.requests.clear()
    failed = run("info", "tiny/huge")
    assert failed.returncode == 1 and failed.stderr == (
        "Error: tiny/huge: vocab.txt has 200 MB on the Hub, at most 128 MB are read: it was not fetched\n"
    )
    assert not [path for _, path, _ in kind.requests if "/resolve/" in path]


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("llava-Q4_K.gguf", "holds a GGUF model (llava-Q4_K.gguf)"),
        ("adapter_config.json", "holds adapters alone (LoRA)"),
        ("README.md", "has no config.json on the Hub"),
    ],
)
def test_repositories_that_hold_no_checkpoint(hub, tmp_path, file, message):
    kind, run = hub
    kind.folders["tiny/part"] = tmp_path / "part"
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / file).write_text("{}")
    for command in (["info", "tiny/part"], ["generate", "tiny/part", "-p", "x"]):
        failed = run(*command)
        assert failed.returncode == 1 and failed.stderr.startswith(f"Error: tiny/part {message}"), failed.stderr
