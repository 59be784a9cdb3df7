"""`mlx-vlm-mini bench`: how fast a checkpoint runs here."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from .options import loading_options
from .peers import OURS, SIDES, compare, missing
from .status import Status

_ROWS = (
    ("loading", "load_s"), ("picture: opening and preprocessing", "open_s"), ("picture: encoding", "encode_s"),
    ("first token, warm", "first_token_s"), ("first token, follow-up turn", "follow_up_s"),
)  # fmt: skip


def _as_contexts(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, ...]:
    """`600,4000` -> (600, 4000)."""
    if not all(part.strip().isdecimal() and int(part) > 0 for part in value.split(",")):
        raise click.BadParameter(f"{value!r} is no list of token numbers, such as 600,4000")
    return tuple(int(part) for part in value.split(","))


def _as_sides(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...]:
    """`mlx-vlm,transformers` -> ("mlx-vlm", "transformers")."""
    names = () if value is None else tuple(dict.fromkeys(name.strip() for name in value.split(",")))
    others = [name for name in SIDES if name != OURS]
    for name in names:
        if name not in others:
            raise click.BadParameter(f"{name!r} is unknown; known are {' and '.join(others)}")
        if missing(name):
            raise click.BadParameter(f"{name} is not installed in this environment: pip install {name}")
    return names


def _as_report(ctx: click.Context, param: click.Parameter, value: str | None) -> Path | None:
    """The file without its suffix."""
    if value is None:
        return None
    path = Path(value)
    if path.suffix not in ("", ".md", ".json"):
        raise click.BadParameter(f"{value!r} should end in .md or .json; both files are written")
    if not path.absolute().parent.is_dir():
        raise click.BadParameter(f"there is no folder {str(path.parent)!r}")
    return path.with_suffix("")


@click.command("bench")
@click.argument("model", metavar="MODEL")
@click.option("-i", "--image", metavar="IMAGE", help="The picture; by default one is drawn, 1024x768 pixels.")
@click.option(
    "--context", "contexts", callback=_as_contexts, default="600,4000", show_default=True, metavar="N,...",
    help="Tokens behind which decoding is measured.",
)  # fmt: skip
@click.option("--prompt-tokens", type=click.IntRange(1), help="Length of the first prompt, at least.")
@click.option("--max-tokens", type=click.IntRange(1), default=32, show_default=True, help="Tokens decoded a context.")
@click.option(
    "--bandwidth", type=click.FloatRange(0, min_open=True), metavar="GB/S", help="Of the memory.  [default: measured]"
)
@click.option(
    "--against", "sides", callback=_as_sides, metavar="NAME,...",
    help=f"Have other programs answer the same question in turns: {', '.join(name for name in SIDES if name != OURS)}.",
)  # fmt: skip
@click.option(
    "--report",
    callback=_as_report,
    metavar="FILE",
    help="Write machine, versions and figures to FILE.md and FILE.json.",
)
@loading_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def command(
    model: str,
    image: str | None,
    contexts: tuple[int, ...],
    prompt_tokens: int | None,
    max_tokens: int,
    bandwidth: float | None,
    sides: tuple[str, ...],
    report: Path | None,
    as_json: bool,
    loading: dict[str, Any],
) -> None:
    """Measure how fast MODEL runs on this machine, and how near decoding comes to the limit of its memory.

    \b
    Example:
      mlx-vlm-mini bench mlx-community/Qwen2-VL-2B-Instruct-4bit --bandwidth 400
      mlx-vlm-mini bench mlx-community/Qwen2-VL-2B-Instruct-4bit --against mlx-vlm --report bench.md
    """
    from mlx_vlm_mini.layers.cpu.blas import use_openblas

    with Status() as status:
        status.show("starting")
        use_openblas()
        from .measure import bench

        found = bench(
            model, image=image, contexts=contexts, prompt_tokens=prompt_tokens, max_tokens=max_tokens,
            bandwidth=None if bandwidth is None else bandwidth * 1e9, say=status.show, **loading,
        )  # fmt: skip
        if sides:
            found["against"] = _compare(model, image, (OURS, *sides), max_tokens, loading, status)
    text = table(found)
    if report is not None:
        report.with_suffix(".md").write_text(text + "\n")
        report.with_suffix(".json").write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n")
    click.echo(json.dumps(found, ensure_ascii=False) if as_json else text)


def _compare(
    model: str, image: str | None, sides: Sequence[str], tokens: int, loading: dict[str, Any], status: Status
) -> list[dict[str, Any]]:
    from mlx_vlm_mini.checkpoints.hub import find_folder

    from .measure import QUESTION, ROUNDS, draw_picture

    folder = find_folder(model, revision=loading["revision"])
    with tempfile.TemporaryDirectory() as place:
        picture = Path(place, "picture.jpg")
        if image is None:
            picture.write_bytes(draw_picture())
        return compare(
            str(folder), image or str(picture), QUESTION, sides, tokens=tokens, rounds=ROUNDS, dtype=loading["dtype"],
            say=status.show,
        )  # fmt: skip


def table(found: dict[str, Any]) -> str:
    """What `measure.bench` gives, for people: a Markdown table, and a line on the machine."""
    lines = [f"| {found['model']} ({found['family']}, {found['dtype']}) | |", "|---|---|"]
    lines += [f"| {title} | {_seconds(found[key])} |" for title, key in _ROWS]
    experts = (
        [f"| experts, those of a token | {found['experts']}, {found['experts_per_token']} |"]
        if "experts" in found
        else []
    )
    lines += [
        f"| tokens of the first prompt, of the picture | {found['prompt_tokens']:,}, {found['image_tokens']:,} |",
        f"| weights, those read for a token | {_bytes(found['weight_bytes'])}, {_bytes(found['bytes_per_token'])} |",
        *experts,
        f"| memory bandwidth | {found['bandwidth_bytes_per_s'] / 1e9:.1f} GB/s |",
    ]
    for one in found["decoding"]:
        lines.append(
            f"| decoding behind {one['context']:,} tokens | {one['tokens_per_s']:.1f} tokens/s: "
            f"{_bytes(one['bytes_per_token'])} a token, {100 * one['bandwidth_share']:.0f} % of the bandwidth; "
            f"Python {one['python_s'] * 1e3:.2f} ms |"
        )
    lines.append(
        f"| peak memory: MLX, process | {_bytes(found['peak_memory_bytes'])}, {_bytes(found['peak_rss_bytes'])} |"
    )
    if found["trace_fault"] is not None:
        lines.append(f"| decoding steps are built by Python | {found['trace_fault']} |")
    if "against" in found:
        lines += ["", *_against(found["against"])]
    machine, versions = found["machine"], dict(found["versions"])
    for row in found.get("against", ()):
        versions |= row.get("versions", {})
    where = f"{machine['device']} ({machine['kind']}), {machine['cores']} cores, {machine['system']}"
    return "\n".join([*lines, "", f"{where}; " + ", ".join(f"{name} {number}" for name, number in versions.items())])


def _against(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A Markdown table, a row a program."""
    lines = [
        "| program | loading | first token | tokens/s | peak memory | prompt tokens | first tokens that agree |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['side']} | failed: {row['error']} | | | | | |")
            continue
        rate = "-" if row["tokens_per_s"] is None else f"{row['tokens_per_s']:.1f}"
        lines.append(
            f"| {row['side']} | {_seconds(row['load_s'])} | {_seconds(row['first_token_s'])} | {rate} | "
            f"{_bytes(row['peak_rss_bytes'])} | {row['prompt_tokens']:,} | {row['same_tokens']} |"
        )
    return lines


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def _bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
