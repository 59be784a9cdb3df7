"""A model's name -> a folder on this machine: a folder's path, or a Hub name, downloaded once and then cached."""

import re
from pathlib import Path

from .errors import CheckpointError

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
"""Everything but the weights: configs, tokenizers, chat templates."""
WEIGHT_FILES = ("model*.safetensors",)


def is_hub_name(name: str) -> bool:
    """Whether `name` can only be meant as `owner/model`: of that form, and no folder here."""
    return _HUB_NAME.fullmatch(name) is not None and not Path(name).exists()


def find_folder(name: str | Path, *, revision: str | None = None, weights: bool = True) -> Path:
    """The folder of a checkpoint; a Hub name is downloaded (only files of the kinds that are read here).

    Args:
        name: a path, or a Hub name such as "llava-hf/llava-1.5-7b-hf".
        revision: branch, tag or commit on the Hub.
        weights: whether the tensors are needed, or only the small files.

    Raises:
        CheckpointError: there is no such folder, or the Hub does not give it.
    """
    if isinstance(name, Path) or not is_hub_name(name):
        return Path(name).expanduser()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    patterns = [*SMALL_FILES, *(WEIGHT_FILES if weights else ())]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except GatedRepoError:
        raise CheckpointError(
            f"{name} is gated: accept its terms on its Hub page, then run `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"{name} is neither a folder here nor a public model on the Hub; if it is private, run `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise CheckpointError(f"{name} has no revision '{revision}' on the Hub") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        raise CheckpointError(
            f"{name} is neither a folder here nor in the Hub's cache, and the Hub cannot be reached"
        ) from None
    except HfHubHTTPError as error:
        raise CheckpointError(f"the Hub refuses {name}: {str(error).splitlines()[0]}") from None
    except OSError as error:
        raise CheckpointError(f"cannot download {name}: {error}") from None
