"""The group of commands, and the boundary where errors become one line."""

import atexit
import errno
import gc
import signal
import sys
from importlib import import_module
from typing import Any

import click

from mlx_vlm_mini import __version__
from mlx_vlm_mini.errors import VLMError

COMMANDS = (
    "chat", "generate", "status", "convert", "info", "attend", "imagine", "compose", "train", "eval", "scenes", "score", "bench",
    "serve", "models", "pull", "rm",
)  # fmt: skip
_FILES = {"status": "counts"}  # of commands that are not called as their file
INTERRUPTED = 128 + signal.SIGINT

# At the end nobody needs the memory that a last search for cycles finds; it takes 40 ms.
atexit.register(gc.freeze)


class Commands(click.Group):
    """Imports a command's file when it is asked for, and turns its errors into one line and exit code 1."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"mlx_vlm_mini.cli.{_FILES.get(cmd_name, cmd_name)}").command
        return command

    def invoke(self, ctx: click.Context) -> Any:
        for ending in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(ending, _terminate)
        try:
            return super().invoke(ctx)
        except VLMError as error:
            raise click.ClickException(" ".join(str(error).split())) from None
        except KeyboardInterrupt:
            click.echo(err=True)
            ctx.exit(INTERRUPTED)
        except MemoryError:
            raise click.ClickException("out of memory: choose a smaller or a quantized model") from None
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            where = f"{error.filename}: " if error.filename else ""
            raise click.ClickException(str(VLMError(f"{where}{error.strerror or error}"))) from None


def _terminate(number: int, _: object) -> None:
    """SIGTERM and a closed terminal clean up as Ctrl-C does: work folders are removed on the way out."""
    sys.exit(128 + number)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mlx-vlm-mini")
def main() -> None:
    """Vision-language models on Apple MLX: convert them, chat with them.

    \b
    Example:
      mlx-vlm-mini chat llava-hf/llava-1.5-7b-hf -i photo.jpg
    """


if __name__ == "__main__":
    sys.exit(main())
