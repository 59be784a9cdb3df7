"""`models`, `pull` and `rm`: what is in the Hub's cache, in and out of it."""

import json
import shutil

from checkpoints import PLAIN
from click.testing import CliRunner

from mlx_vlm_mini.cli.main import main
from mlx_vlm_mini.layers import memory


def test_a_model_comes_into_the_cache_and_leaves_it(hub):
    _, run = hub
    assert "there are no models" in run("models").stderr
    pulled = run("pull", "tiny/llava")
    assert pulled.returncode == 0 and "models--tiny--llava/snapshots/" in pulled.stdout
    (line,) = run("models").stdout.splitlines()
    assert line.startswith("tiny/llava ") and " llava, 32.0 bits, fits" in line
    row = json.loads(run("models", "--json").stdout)
    assert row["name"] == "tiny/llava" and row["vision"] and row["error"] is None and row["needs"] <= row["bytes"]
    unsaid = run("rm", "tiny/llava")
    assert unsaid.returncode == 1 and "Delete tiny/llava" in unsaid.stderr and run("models").stdout
    gone = run("rm", "tiny/llava", "--yes")
    assert gone.returncode == 0 and "deleted tiny/llava" in gone.stderr and run("models").stdout == ""
    for words, message in (
        (("rm", "tiny/llava", "-y"), "tiny/llava is not in the Hub's cache, which holds nothing"),
        (("pull", "nothing/here"), "is neither a folder here nor a public model"),
        (("pull", str(PLAIN)), "is no name of a model on the Hub"),
    ):
        failed = run(*words)
        assert failed.returncode == 1 and message in failed.stderr and failed.stderr.count("\n") == 1


def test_folders_with_models_and_without(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "none"))
    shutil.copytree(PLAIN, tmp_path / "one")
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "config.json").write_text('{"model_type": "bert"}')
    found = CliRunner().invoke(main, ["models", str(tmp_path)]).stdout.splitlines()
    assert len(found) == 2 and "llava, 32.0 bits, fits" in found[0] and "cannot be used: " in found[1]
    monkeypatch.setattr(memory, "device_memory", lambda: 1000)
    assert "needs 0.0 GB, and this machine has less" in CliRunner().invoke(main, ["models", str(tmp_path)]).stdout
    bad = CliRunner().invoke(main, ["models", str(tmp_path / "no")])
    assert bad.exit_code == 1 and "is no folder" in bad.stderr
