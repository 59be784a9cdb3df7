"""OpenBLAS: loaded before MLX or not at all, and the same answers with it."""

import json
import os
import subprocess
import sys

from checkpoints import PHOTO, PLAIN

from mlx_vlm_mini.layers.cpu.blas import use_openblas

ANSWER = (
    "import json, sys; from mlx_vlm_mini import load, stream_generate\n"
    f"chunks = stream_generate(*load({str(PLAIN)!r}), 'Hi', images=[{str(PHOTO)!r}], max_tokens=8)\n"
    "print(json.dumps([[chunk.token for chunk in chunks], 'libopenblas' in open('/proc/self/maps').read()]))"
)


def run(code: str, **environment: str) -> object:
    own = {name: value for name, value in os.environ.items() if name != "OPENBLAS_THREAD_TIMEOUT"} | environment
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=own, timeout=60)
    return json.loads(done.stdout)


def test_it_is_too_late_once_mlx_is_imported():
    assert "mlx.core" in sys.modules and use_openblas() is False


def test_nothing_imports_mlx_before_the_commands_load_a_model():
    """`generate` and `chat` open their images first; MLX imported by that would keep OpenBLAS out."""
    modules = (
        "images.source",
        "errors",
        "layers.cpu.blas",
        "cli.main",
        "cli.generate",
        "cli.chat",
        "cli.options",
        "cli.status",
    )
    imports = "".join(f"import mlx_vlm_mini.{module}\n" for module in modules)
    assert run(f"import json, sys\n{imports}print(json.dumps('mlx.core' in sys.modules))") is False


def test_the_answer_is_the_same_with_it_and_without():
    """Where it is installed, the first public name loads it; where MLX is imported before, it stays out."""
    installed = run(
        "import json; from mlx_vlm_mini.layers.cpu.blas import use_openblas; print(json.dumps(use_openblas()))"
    )
    if sys.platform == "linux":
        (tokens, loaded), (expected, loaded_late) = run(ANSWER), run("import mlx.core\n" + ANSWER)
        assert tokens == expected
        assert (loaded, loaded_late) == (installed, False)
    else:
        assert installed is False


def test_the_environment_leaves_it_out_and_info_says_what_computes():
    code = (
        "import json; from mlx_vlm_mini.layers.cpu.blas import describe_device, use_openblas; found = use_openblas()\n"
        "import os; print(json.dumps([found, os.environ.get('OPENBLAS_THREAD_TIMEOUT'), describe_device()]))"
    )
    for choice in ("0", "1"):
        found, timeout, device = run(code, MLX_VLM_MINI_OPENBLAS=choice, OPENBLAS_NUM_THREADS="1")
        if sys.platform != "linux" or choice == "0":
            assert found is False
        if sys.platform == "linux":
            assert timeout is None  # the environment is as it was
            assert ("OpenBLAS" in device) is found and device.startswith("CPU, ")


def test_a_process_ends_while_something_is_computed():
    """OpenBLAS hung in one of three such ends."""
    code = (
        "from mlx_vlm_mini.layers.cpu.blas import use_openblas; use_openblas(); import mlx.core as mx; a = mx.full((500, 500), 1e-3)\n"
        "b = a\nfor _ in range(40): b = b @ a\nmx.async_eval(b); print(1)"
    )
    for _ in range(6):
        assert run(code, OPENBLAS_NUM_THREADS="2") == 1
