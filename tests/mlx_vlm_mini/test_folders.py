"""Folders as people have them: stale indexes, links into the Hub's cache, pointers of Git LFS, and what is no checkpoint."""

import json
import shutil

import pytest
from checkpoints import PHOTO, PLAIN
from reference import GOLDEN

from mlx_vlm_mini import load
from mlx_vlm_mini.checkpoints.describe import describe
from mlx_vlm_mini.checkpoints.folder import choose_tensor_files
from mlx_vlm_mini.checkpoints.hub import HubName, parse_hub_name
from mlx_vlm_mini.errors import CheckpointError, PromptError

STALE = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model-00001-of-00001.safetensors", "weights.safetensors", "weights.00.safetensors"]
)
def test_an_index_whose_files_nobody_ships(copy_of, name):
    folder = copy_of()
    (folder / "model.safetensors").rename(folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps(STALE))
    assert (load(folder)[0](load(PLAIN)[1]("Hi", [PHOTO])) == load(PLAIN)[0](load(PLAIN)[1]("Hi", [PHOTO]))).all()


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        ("model.safetensors a-1 a-2", "a-1 a-2"),
        ("model.safetensors a-1", "model.safetensors"),
        ("model-9.safetensors a-1", "a-1 a-2"),
        ("model-9.safetensors", "model-9.safetensors"),
        ("pytorch_model.bin", "pytorch_model.bin"),
        ("w.safetensors adapter_model.safetensors", "w.safetensors"),
        ("adapter_model.safetensors", "a-1 a-2"),
    ],
)
def test_which_files_count_beside_an_index(names, chosen):
    held = {*names.split(), "model.safetensors.index.json"}
    assert choose_tensor_files(held, lambda index: ["a-1", "a-2"]) == chosen.split()


def test_links_into_the_hubs_cache(tmp_path):
    """A folder inside a repository, and a folder of anybody's with links to the files of the cache."""
    repo = tmp_path / "hub" / "models--o--m"
    inside, mine = repo / "snapshots" / ("c0ffee" + "0" * 34) / "4bit", tmp_path / "mine"
    for folder in (repo / "blobs", inside, mine):
        folder.mkdir(parents=True)
    for number, file in enumerate(sorted(PLAIN.iterdir())):
        shutil.copyfile(file, repo / "blobs" / f"{number:040x}")
        (inside / file.name).symlink_to(f"../../../blobs/{number:040x}")
        (mine / file.name).symlink_to(inside / file.name)
    for folder in (inside, mine):
        assert load(folder)[1].image_token == "<image>"
    (repo / "blobs" / "notes").write_text("{}")
    (mine / "added_tokens.json").symlink_to(repo / "blobs" / "notes")
    with pytest.raises(CheckpointError, match="is a link to .*notes, outside its folder"):
        load(mine)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_pointers_of_git_lfs(copy_of, name):
    folder = copy_of()
    (folder / name).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12\n")
    with pytest.raises(CheckpointError, match=f"{name} is a Git LFS pointer, .*: run `git lfs pull` in its folder"):
        load(folder)


def test_pickles_may_be_pointers_too(copy_of):
    folder = copy_of()
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin is a Git LFS pointer"):
        load(folder)


@pytest.mark.parametrize("config", [True, False])
@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("llava-Q4_K.gguf", r"holds a GGUF model \(llava-Q4_K.gguf\), llama.cpp's format: give the repository"),
        ("adapter_config.json", r"holds adapters alone \(LoRA\): merge them into their model"),
    ],
)
def test_what_is_no_checkpoint_is_named(copy_of, config, file, message):
    folder = copy_of()
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / file).write_text("{}")
    if not config:
        (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_a_gguf_file(tmp_path):
    (tmp_path / "a.gguf").write_text("GGUF")
    with pytest.raises(CheckpointError, match=r"a.gguf holds a GGUF model"):
        load(tmp_path / "a.gguf")


def test_names_on_the_hub():
    own = {
        "o/m": HubName("o/m", None, ""),
        "o/m/4bit": HubName("o/m", None, "4bit"),
        "https://huggingface.co/o/m": HubName("o/m", None, ""),
        "https://huggingface.co/o/m/": HubName("o/m", None, ""),
        "https://huggingface.co/o/m/tree/main": HubName("o/m", "main", ""),
        "http://hf.co/o/m/tree/refs%2Fpr%2F1?x=1": None,
        "https://huggingface.co/o/m/tree/v1/4bit/x": HubName("o/m", "v1", "4bit/x"),
        "o/m/../x": None, "/o/m": None, "./o/m": None, "m": None, "https://example.org/o/m": None, "~/o/m": None,
    }  # fmt: skip
    for name, expected in own.items():
        if "refs" not in name:
            assert parse_hub_name(name) == expected, name
    with pytest.raises(CheckpointError, match="is no model's page: give owner/model"):
        parse_hub_name("https://huggingface.co/o/m/blob/main/config.json")


def test_folders_of_the_goldens_are_as_they_were():
    for folder in GOLDEN.glob("*/model.safetensors"):
        assert choose_tensor_files({folder.name}, lambda index: []) == ["model.safetensors"]


def test_tokens_without_an_embedding_are_counted_and_refused(copy_of):
    """Added to a tokenizer without rows for them: looking them up would read past the table."""
    folder = copy_of()
    assert "tokens_without_embedding" not in describe(folder, check=True)
    model, processor = load(folder)
    rows, first = model.config.decoder.num_embeddings, processor.tokenizer.backend.get_vocab_size()
    content = json.loads((folder / "tokenizer.json").read_text())
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    content["added_tokens"] += [
        {"id": token, "content": f"<extra{token}>", **plain} for token in range(first, rows + 3)
    ]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert describe(folder, check=True)["tokens_without_embedding"] == 3
    processor = load(folder)[1]
    with pytest.raises(
        PromptError, match=f"the token <extra{rows}> with the id {rows}, .* embeddings of {rows} tokens"
    ):
        processor(f"What is <extra{rows}>?")
    assert processor("What?").input_ids.shape[1] > 0
