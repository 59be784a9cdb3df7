"""Options that keep answers in a form: --schema, --choices, --regex and --grammar."""

import csv
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from .options import complete_files

FORMS = ("schema", "choices", "regex", "grammar")


class FormType(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions alone
    """What one of the options says, read and checked: before a model is loaded, and for `/set`."""

    def __init__(self, kind: str) -> None:
        self.kind = self.name = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Raises PromptError where a file cannot be read, or the form cannot be followed."""
        from mlx_vlm_mini.text.forms import make_form

        if isinstance(value, str):
            value = self._read(value)
        make_form(**{self.kind: value})
        return value

    def _read(self, given: str) -> Any:
        if self.kind == "choices":
            rows = [*csv.reader([given], skipinitialspace=True)]
            return rows[0] if rows else []
        if self.kind == "regex" or given == "json":
            return given
        from mlx_vlm_mini.errors import PromptError

        try:
            return Path(given).expanduser().read_text(encoding="utf-8-sig")
        except (OSError, ValueError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise PromptError(f"cannot read the {self.kind} {given}: {reason}") from None


_OPTIONS = {
    "schema": click.option(
        "--schema",
        type=FormType("schema"),
        metavar="FILE",
        help="Answer with JSON that the JSON Schema in FILE allows; `json`: with any JSON object.",
        shell_complete=complete_files,
    ),
    "choices": click.option(
        "--choices",
        type=FormType("choices"),
        metavar="A,B,...",
        help='Answer with one of these texts; "A, B",C where one has a comma. With --json, how probable each is.',
    ),
    "regex": click.option(
        "--regex", type=FormType("regex"), metavar="R", help="Answer with a text that the regular expression matches."
    ),
    "grammar": click.option(
        "--grammar",
        type=FormType("grammar"),
        metavar="FILE",
        help="Answer with a text of the grammar in FILE, in llguidance's form of Lark.",
        shell_complete=complete_files,
    ),
}
choices_option = _OPTIONS["choices"]


def form_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """All of them; what is given is handed on by its name, and nothing else is."""

    @functools.wraps(function)
    def gathered(*arguments: Any, **options: Any) -> Any:
        forms = {name: value for name in FORMS if (value := options.pop(name)) is not None}
        if len(forms) > 1:
            raise click.UsageError(f"an answer has one form: give --{' or --'.join(forms)}")
        return function(*arguments, **options, **forms)

    command: Callable[..., Any] = gathered
    for option in reversed(_OPTIONS.values()):
        command = option(command)
    return command
