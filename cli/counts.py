"""`mlx-vlm-mini status`: how far a long `generate --output` is, over all its parts."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from .part import part_files
from .progress import duration, read_note


@click.command("status")
@click.argument("file", metavar="FILE.jsonl", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(file: Path, as_json: bool) -> None:
    """Count the answers of `generate --output FILE.jsonl`: done, failed and left, over all parts.

    \b
    Example:
      mlx-vlm-mini status answers.jsonl
    """
    from mlx_vlm_mini.errors import PromptError

    from .answers import count_answers

    parts = part_files(file) if file.parent.is_dir() else []
    files = [each for each in (file, *(path for _, path in parts)) if each.is_file()]
    if not files:
        raise PromptError(f"{file}: there is no such file, and none of a part beside it")
    done, failed = count_answers(files)
    runs = [(each, note) for each in files if (note := read_note(each)) is not None]
    totals = [note["total"] for _, note in runs if isinstance(note.get("total"), int)]
    total = max(totals, default=None)
    # A run that ended took its note with it: then nothing is left.
    left = 0 if not runs else None if total is None else max(total - done - failed, 0)
    if as_json:
        entry = {"done": done, "failed": failed, "left": left, "total": total}
        click.echo(json.dumps(entry | {"runs": [{"file": str(each), **note} for each, note in runs]}))
        return
    of = f" of {total:,}" if total is not None else ""
    click.echo(f"{file}: {done:,} done, {failed:,} failed, {'?' if left is None else f'{left:,}'} left{of}")
    for each, note in runs:
        click.echo(f"  {_describe(each, note)}")


def _describe(file: Path, note: Mapping[str, Any]) -> str:
    """One run: its part, what it did, and when it was last heard of."""
    part = "part {} of {}".format(*note["part"]) if note.get("part") else "all of it"
    settled = note["held"] + note["answered"] + note["failed"]
    share, rate = note.get("share"), note.get("per_minute") or 0
    words = [f"{settled:,}" + (f" of {share:,}" if share is not None else "")]
    if note["failed"]:
        words.append(f"{note['failed']:,} failed")
    if rate:
        words.append(f"{rate:.1f} {note.get('unit', 'answers')}/min")
    if note.get("running"):
        if rate and share is not None and share > settled:
            words.append(f"{duration(60 * (share - settled) / rate)} left")
        age = max(time.time() - note["updated"], 0)
        words.append(f"running on {note['host']}" if age < 60 else f"no news from {note['host']} for {duration(age)}")
    else:
        words.append("ended" if share == settled else "stopped")
    return f"{part}: {', '.join(words)}"
