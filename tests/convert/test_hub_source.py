"""Conversions from and to the Hub, against its stand-in: downloads that break, what is refused, and uploads."""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import PLAIN
from hub import COMMIT
from pickles import write_bin
from reference import GOLDEN

from mlx_vlm_mini.checkpoints.folder import open_checkpoint

NAME, SHARDED = "tiny/llava", "tiny/llava-in-shards"


def large(kind, method="GET"):
    """Requests for files of tensors: name and range."""
    return [
        (path.rpartition("/")[2], wanted)
        for verb, path, wanted in kind.requests
        if verb == method and path.endswith((".safetensors", ".bin"))
    ]


def test_the_plan_of_a_hub_model_downloads_no_weights(hub):
    kind, run = hub
    for name in (NAME, SHARDED):
        kind.requests.clear()
        shown = run("convert", name, "--dry-run", "--dtype", "float16")
        assert shown.returncode == 0, shown.stderr
        assert shown.stdout == run("convert", kind.folders[name], "--dry-run", "--dtype", "float16").stdout
        assert "float16              16.00" in shown.stdout
        assert all(wanted for _, wanted in large(kind))
    assert not (Path(kind.folders[NAME]).parent / "out").exists()


def pickled(kind, tmp_path):
    """A repository with nothing but pytorch_model.bin, and the same as a folder here."""
    torch_like = tmp_path / "pickled"
    shutil.copytree(PLAIN, torch_like)
    arrays = mx.load(str(torch_like / "model.safetensors"))
    write_bin(torch_like / "pytorch_model.bin", {name: np.array(array) for name, array in arrays.items()})
    (torch_like / "model.safetensors").unlink()
    kind.folders["tiny/old"] = torch_like
    return torch_like


def test_a_repository_of_pickles(hub, tmp_path):
    """Its plan reads the pickle alone, by ranges; its conversion downloads them, and gives the same tensors."""
    kind, run = hub
    folder = pickled(kind, tmp_path)
    shown = run("convert", "tiny/old", "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout == run("convert", folder, "--dry-run").stdout
    assert large(kind) and all(wanted for _, wanted in large(kind))
    assert json.loads(run("info", "tiny/old", "--json").stdout)["weights"] == 187860
    done = run("convert", "tiny/old", "out")
    assert done.returncode == 0, done.stderr
    assert run("convert", PLAIN, "same").returncode == 0
    arrays, same = (mx.load(str(tmp_path / name / "model.safetensors")) for name in ("out", "same"))
    assert arrays.keys() == same.keys() and all(mx.array_equal(arrays[name], same[name]) for name in same)


def test_only_what_is_needed_is_fetched(hub):
    """No code, no pickles beside safetensors, no other format in a folder of its own."""
    kind, run = hub
    (kind.folders[NAME] / "consolidated.safetensors").write_bytes(b"0" * 1000)
    kind.extra.append("onnx/config.json")
    assert run("convert", NAME, "out").returncode == 0
    fetched = {
        path.rpartition("main/")[2] or path for verb, path, _ in kind.requests if verb == "GET" and "/resolve/" in path
    }
    assert not [
        name for name in fetched if "onnx" in name or name.endswith((".bin", ".py", "consolidated.safetensors"))
    ]


def test_a_download_that_is_cut_goes_on(hub, tmp_path):
    """Where it was cut, in whole pieces of 10 MB, which is how huggingface_hub reads."""
    kind, run = hub
    folder = tmp_path / "large"
    shutil.copytree(PLAIN, folder)
    content = np.random.default_rng(0).bytes(25_000_000)
    (folder / "model.safetensors").write_bytes(content)
    kind.folders["tiny/large"] = folder
    kind.cuts["model.safetensors"] = [11_000_000, 12_000_000]
    script = tmp_path / "download.py"
    script.write_text("from mlx_vlm_mini.checkpoints.hub import find_folder; print(find_folder('tiny/large'))")
    done = run(script, program=sys.executable)
    assert done.returncode == 0, done.stderr
    assert [wanted for _, wanted in large(kind)] == [None, "bytes=10485760-", "bytes=20971520-"]
    assert (Path(done.stdout.strip()) / "model.safetensors").read_bytes() == content


def test_a_damaged_download_is_refused_and_downloaded_again(hub, tmp_path):
    kind, run = hub
    kind.damaged.add("model.safetensors")
    for command in (["convert", NAME, "out"], ["generate", NAME, "-p", "Hi", "--max-tokens", "2"]):
        failed = run(*command)
        line = failed.stderr.splitlines()[-1]
        assert failed.returncode == 1 and "Traceback" not in failed.stderr
        assert line.startswith("Error: model.safetensors arrived damaged: its sha256 is ")
        assert line.endswith("run the command again, which downloads it again")
    assert not list(tmp_path.glob("*out*"))
    kind.damaged.clear()
    assert run("convert", NAME, "out").returncode == 0


def test_a_file_that_went_bad_in_the_cache_is_noticed(hub, tmp_path):
    _kind, run = hub
    assert run("generate", NAME, "-p", "Hi", "--max-tokens", "2").returncode == 0
    (file,) = (tmp_path / "cache").rglob("model.safetensors")
    stored = file.resolve()
    content = bytearray(stored.read_bytes())
    content[-3] ^= 1
    stored.write_bytes(content)
    failed = run("convert", NAME, "out")
    assert failed.returncode == 1 and f"Error: {stored} is damaged: its sha256 is " in failed.stderr
    assert not list(tmp_path.glob("*out*"))
    stored.unlink()
    assert run("convert", NAME, "out").returncode == 0


def test_the_record_names_commit_and_checksums(hub, tmp_path):
    kind, run = hub
    assert run("convert", NAME, "out").returncode == 0
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    digest = hashlib.sha256((kind.folders[NAME] / "model.safetensors").read_bytes()).hexdigest()
    assert record["source"] == {"name": NAME, "revision": COMMIT, "sha256": {"model.safetensors": digest}}


def test_an_index_that_names_a_file_which_is_not_there(hub, tmp_path):
    kind, run = hub
    folder = tmp_path / "sharded"
    shutil.copytree(GOLDEN / "llava-clip-llama-layers", folder)
    kind.folders["tiny/lacking"] = folder
    lost = min(folder.glob("model-*.safetensors"))
    lost.unlink()
    for source in ("tiny/lacking", folder):
        failed = run("convert", source, "out")
        assert failed.returncode == 1 and "Traceback" not in failed.stderr
        assert lost.name in failed.stderr.splitlines()[-1] or "lacking" in failed.stderr.splitlines()[-1]
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("name", ["../../../../../../evil.json", "/tmp/evil.json"])
def test_file_names_that_point_outside(hub, tmp_path, name):
    kind, run = hub
    kind.extra.append(name)
    done = run("convert", NAME, "out")
    assert "Traceback" not in done.stderr
    assert not [*tmp_path.rglob("*evil.json"), *Path("/tmp").glob("evil.json")]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tiny/none", "tiny/none is neither a folder here nor a public model on the Hub; if it is private, run"),
        ("meta/secret", "meta/secret is gated: accept its terms on its Hub page, then run `hf auth login`"),
        ("tiny/gated", "tiny/gated is gated: accept its terms on its Hub page, then run `hf auth login`"),
    ],
)
def test_what_the_hub_does_not_give(hub, tmp_path, name, message):
    """404; and gated ones, whether the listing or only the files are refused."""
    kind, run = hub
    kind.folders["tiny/gated"] = PLAIN
    kind.gated.add("tiny/gated")
    for options in (["out"], ["--dry-run"])[: 2 if name == "tiny/none" else 1]:
        failed = run("convert", name, *options)
        assert failed.returncode == 1 and failed.stdout == "" and "Traceback" not in failed.stderr
        assert failed.stderr.splitlines()[-1].startswith(f"Error: {message}")
    assert not list(tmp_path.glob("*out*"))


def test_no_network(hub, tmp_path):
    _, run = hub
    for environment in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        failed = run("convert", NAME, "out", **environment)
        assert failed.returncode == 1 and failed.stderr.count("\n") == 1
        assert "nor in the Hub's cache, and the Hub cannot be reached" in failed.stderr
    assert not list(tmp_path.glob("*out*"))


def test_what_is_in_the_cache_needs_no_network(hub):
    kind, run = hub
    assert run("generate", NAME, "-p", "Hi", "--max-tokens", "2").returncode == 0
    kind.requests.clear()
    for options in (["--dry-run"], ["out"]):
        done = run("convert", NAME, *options, HF_HUB_OFFLINE="1")
        assert done.returncode == 0, done.stderr
    assert kind.requests == []


@pytest.mark.parametrize("source", [NAME, "here"])
def test_upload(hub, tmp_path, source):
    kind, run = hub
    shutil.copytree(PLAIN, tmp_path / "here")
    done = run("convert", source, "out", "--upload", "somebody/small", HF_TOKEN=kind.token)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith("/somebody/small")
    assert kind.created["somebody/small"] == {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    card = kind.created["somebody/small"]["README.md"].decode()
    assert (
        card.startswith("---\n") and "library_name: mlx\n" in card and "| decoder | 51,180 | float32 | 32.00 |" in card
    )
    assert ("base_model: tiny/llava\n" in card) == (source == NAME)
    assert str(tmp_path) not in card
    kind.folders["somebody/small"] = tmp_path / "out"
    assert open_checkpoint(tmp_path / "out").is_mlx
    again = run("generate", "somebody/small", "-p", "Hi", "--max-tokens", "2")
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize(
    ("repo", "token", "message"),
    [
        ("somebody/small", "", "there is no token for the Hub; run `hf auth login`"),
        ("somebody/small", "hf_wrong", "the Hub does not accept the token; run `hf auth login`"),
        ("small", "hf_secret", "--upload needs a name such as owner/model, not 'small'"),
    ],
)
def test_uploads_that_cannot_be_are_refused_before_the_work(hub, tmp_path, repo, token, message):
    _, run = hub
    failed = run("convert", PLAIN, "out", "--upload", repo, **({"HF_TOKEN": token} if token else {}))
    assert failed.returncode == 1 and failed.stderr.count("\n") == 1 and message in failed.stderr
    assert not list(tmp_path.glob("*out*"))


def test_an_upload_that_is_refused_leaves_the_folder(hub, tmp_path):
    kind, run = hub
    kind.read_only.add("others/small")
    failed = run("convert", PLAIN, "out", "--upload", "others/small", HF_TOKEN=kind.token)
    assert failed.returncode == 1 and "Traceback" not in failed.stderr
    assert failed.stderr.splitlines()[-1] == (
        f"Error: {tmp_path}/out is whole, but not uploaded; `hf upload others/small {tmp_path}/out` tries again: "
        "the token may not write there"
    )
    assert open_checkpoint(tmp_path / "out").tensors
