"""A converted folder onto the Hub, with a model card."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mlx_vlm_mini import __version__
from mlx_vlm_mini.checkpoints.hub import parse_hub_name
from mlx_vlm_mini.errors import CheckpointError

from .conversion import Report


def check_access(repo: str) -> None:
    """Make sure before the work that there is someone to upload as.

    Raises:
        CheckpointError: the name is none of a repository, or there is no token, or the Hub cannot be reached.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise CheckpointError(f"--upload needs a name such as owner/model, not '{repo}'")
    with _errors(f"nothing was converted, because {repo} cannot be uploaded to"):
        from huggingface_hub import HfApi

        HfApi().whoami()


def upload_folder(report: Report, repo: str) -> str:
    """Upload a result, with a README.md that says what it is; gives the address.

    Raises:
        CheckpointError: the Hub refuses it, or cannot be reached. The folder stays as it is.
    """
    folder = report.destination
    again = f"{folder} is whole, but not uploaded; `hf upload {repo} {folder}` tries again"
    with _errors(again):
        from huggingface_hub import HfApi

        api = HfApi()
        (folder / "README.md").write_text(_model_card(report, repo), encoding="utf-8")
        api.create_repo(repo, exist_ok=True)
        message = f"Convert {report.source} with mlx-vlm-mini {__version__}"
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
        return f"{api.endpoint}/{repo}"


@contextmanager
def _errors(consequence: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into one line."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError  # type: ignore[attr-defined]

    try:
        yield
    except LocalTokenNotFoundError:
        reason = "there is no token for the Hub; run `hf auth login`"
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        known = {401: "the Hub does not accept the token; run `hf auth login`", 403: "the token may not write there"}
        reason = known.get(status, str(error).splitlines()[0]) if status else str(error).splitlines()[0]
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    else:
        return
    raise CheckpointError(f"{consequence}: {reason}") from None


def _model_card(report: Report, repo: str) -> str:
    from huggingface_hub import HfApi, ModelCardData

    place = parse_hub_name(report.source) if report.revision is not None else None
    base: dict[str, Any] = {} if place is None else {"base_model": place.repo}
    if place is not None:
        source = HfApi().model_info(place.repo, revision=report.revision).card_data
        if source is not None and source.license is not None:
            base["license"] = source.license
    data = ModelCardData(library_name="mlx", pipeline_tag="image-text-to-text", tags=["mlx"], **base)
    plan = report.preview
    rows = "\n".join(
        f"| {part.part} | {part.weights:,} | {' + '.join(part.kinds)} | {part.bits_per_weight:.2f} | {part.bytes:,} |"
        for part in plan.parts
    )
    name = report.source if base else report.source.rpartition("/")[2]
    revision = f" (revision `{report.revision}`)" if report.revision else ""
    return f"""---
{data.to_yaml()}
---

# {repo.partition("/")[2]}

{name}{revision} in MLX's format, converted with mlx-vlm-mini {__version__}: {plan.bytes / 1e9:.2f} GB,
{plan.bits_per_weight:.2f} bits per weight. `conversion.json` says from which files and how, with their sha256.

| part | weights | stored as | bits per weight | bytes |
|---|---|---|---|---|
{rows}

```bash
mlx-vlm-mini chat {repo} -i photo.jpg
```
"""
