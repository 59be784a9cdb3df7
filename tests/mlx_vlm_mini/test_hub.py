"""Hub names, against a stand-in of the Hub's HTTP interface on loopback."""

import json

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
