"""`mlx-vlm-mini eval`: how often a model answers right, and whether it looks at the pictures."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from .forms import choices_option
from .options import loading_options, model_argument
from .status import Status
from .writing import echo


@click.command("eval")
@model_argument
@click.option(
    "--data", required=True, type=click.Path(path_type=Path), help="JSONL of conversations, each with its `kind`."
)
@click.option("--blank/--no-blank", default=True, help="Ask again with blank pictures.  [default: blank]")
@click.option(
    "--think/--no-think",
    default=None,
    help="Whether the model thinks before it answers.  [default: as its chat template does]",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(1),
    help="Length of an answer at most, its thinking included.  [default: 8 tokens more than the right answer has]",
)
@choices_option
@loading_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    model: str,
    data: Path,
    blank: bool,
    think: bool | None,
    max_tokens: int | None,
    choices: list[str] | None,
    loading: dict[str, Any],
    as_json: bool,
) -> None:
    """Ask MODEL the questions of a JSONL file and count exact matches, with the pictures and with blank ones.

    \b
    Example:
      mlx-vlm-mini eval my-llava --data test/scenes.jsonl
    """
    from mlx_vlm_mini import load
    from mlx_vlm_mini.data.examples import read_examples
    from mlx_vlm_mini.train.evaluate import evaluate

    with Status() as status:
        examples = read_examples(data)
        status.show(f"loading {model}")
        vlm, processor = load(model, **loading)
        scores = evaluate(
            vlm, processor, examples, blank=blank, think=think, max_tokens=max_tokens, choices=choices,
            progress=lambda done, total: status.show(f"asked {done} of {total}"),
        )  # fmt: skip
    if as_json:
        click.echo(json.dumps({kind: asdict(score) for kind, score in scores.items()}))
        return
    echo(f"{'kind':<12} {'questions':>9} {'right':>8}" + (f" {'blank':>8}" if blank else ""))
    for kind, score in scores.items():
        parts = (part for part in (score.right, score.right_blank) if part is not None)
        shares = (f"{100 * part / score.questions:.1f} %" for part in parts)
        echo(f"{kind:<12} {score.questions:>9} " + " ".join(f"{share:>8}" for share in shares))
