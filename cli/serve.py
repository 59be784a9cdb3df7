"""`mlx-vlm-mini serve`: OpenAI's and Ollama's interfaces over HTTP."""

import os
import sys
from pathlib import Path
from typing import Any

import click

from mlx_vlm_mini.checkpoints import bundled
from mlx_vlm_mini.errors import VLMError

from .main import INTERRUPTED
from .options import loading_options
from .writing import neutralize

KEY = "MLX_VLM_MINI_API_KEY"
MISSING = "serving needs further packages: install them with `pip install 'mlx-vlm-mini[serve]'`"


@click.command("serve")
@click.argument("models", metavar="[MODEL]...", nargs=-1)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; another needs a key.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 is any that is free.")
@click.option("--api-key", metavar="KEY", help=f"What each request must bring.  [default: {KEY}]")
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="Answers that are given together at most.",
)
@click.option(
    "--max-tokens", type=click.IntRange(1), default=4096, show_default=True, help="Of an answer, unless asked."
)
@click.option("--queue", type=click.IntRange(0), default=64, show_default=True, help="Requests that may wait.")
@click.option("--allow-urls", is_flag=True, help="Pictures may be http(s) addresses of the internet.")
@click.option("--origin", "origins", metavar="ORIGIN", multiple=True, help="Whose pages may ask, as http://host:port.")
@click.option(
    "--models-dir",
    "folders",
    metavar="FOLDER",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Serve the models in its folders, too.",
)
@click.option("--hub-cache", is_flag=True, help="Serve the models in the Hub's cache, too.")
@click.option("--max-loaded", type=click.IntRange(1), default=1, show_default=True, help="Models in memory at a time.")
@loading_options
def command(
    models: tuple[str, ...],
    host: str,
    port: int,
    api_key: str | None,
    batch_size: int,
    max_tokens: int,
    queue: int,
    allow_urls: bool,
    origins: tuple[str, ...],
    folders: tuple[Path, ...],
    hub_cache: bool,
    max_loaded: int,
    loading: dict[str, Any],
) -> None:
    """Answer over HTTP as OpenAI's and Ollama's servers do; each MODEL by its name, the first one is loaded.

    Only this machine is answered, unless --host and --api-key say otherwise. docs/server.md has settings for clients.

    \b
    Example:
      mlx-vlm-mini serve mlx-community/Qwen2.5-VL-3B-Instruct-4bit
    """
    from mlx_vlm_mini.layers.cpu.blas import use_openblas

    use_openblas()
    try:
        from mlx_vlm_mini.serve.limits import Limits
        from mlx_vlm_mini.serve.refusals import Refusal
        from mlx_vlm_mini.serve.run import Settings, serve
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.partition(".")[0] == "mlx_vlm_mini":
            raise
        raise VLMError(MISSING) from None
    settings = Settings(
        models=models or (() if folders or hub_cache else (bundled.NAME,)),
        folders=folders,
        hub_cache=hub_cache,
        host=host,
        port=port,
        key=api_key if api_key is not None else os.environ.get(KEY),
        batch_size=batch_size,
        most_loaded=max_loaded,
        allow_urls=allow_urls,
        origins=origins,
        limits=Limits(max_tokens=max_tokens, queue=queue),
        loading={name: value for name, value in loading.items() if value is not None},
    )
    code = 0
    try:
        serve(settings, lambda line: click.echo(neutralize(line), err=True))
    except Refusal as refusal:
        raise VLMError(refusal.message) from None
    except KeyboardInterrupt:
        click.echo(err=True)
        code = INTERRUPTED
    # All is closed. MLX 0.32 aborts a process that ends soon after a thread that drew random numbers.
    sys.stderr.flush()
    os._exit(code)
