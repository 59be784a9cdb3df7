"""A model's name -> a folder on this machine: a folder's path, or a Hub name, downloaded once and then cached."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .checkpoint import Header, TensorInfo
from .errors import CheckpointError

_HUB_FILE = re.compile(
    r"https://huggingface\.co/(?:(?P<kind>space|dataset|model)s/)?(?P<name>[^/]+/[^/]+)/(?:resolve|blob)/"
    r"(?P<revision>[^/]+)/(?P<file>[^?#]+)"
)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
"""Everything but the weights: configs, tokenizers, chat templates."""
WEIGHT_FILES = ("model*.safetensors",)
PICKLED_FILES = ("pytorch_model*.bin",)
"""Fetched where there are no others."""


def is_hub_name(name: str) -> bool:
    """Whether `name` can only be meant as `owner/model`: of that form, and no folder here."""
    return _HUB_NAME.fullmatch(name) is not None and not Path(name).exists()


@contextmanager
def _hub_errors(name: str, revision: str | None) -> Iterator[None]:
    """Turn what huggingface_hub raises into one line."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        NotASafetensorsRepoError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
        SafetensorsParsingError,
    )

    try:
        yield
    except GatedRepoError:
        message = f"{name} is gated: accept its terms on its Hub page, then run `hf auth login`"
    except RepositoryNotFoundError:
        message = (
            f"{name} is neither a folder here nor a public model on the Hub; if it is private, run `hf auth login`"
        )
    except RevisionNotFoundError:
        message = f"{name} has no revision '{revision}' on the Hub"
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        message = f"{name} is neither a folder here nor in the Hub's cache, and the Hub cannot be reached"
    except (NotASafetensorsRepoError, SafetensorsParsingError):
        message = f"{name} has no readable safetensors files on the Hub"
    except HfHubHTTPError as error:
        message = f"the Hub refuses {name}: {str(error).splitlines()[0]}"
    except OSError as error:
        message = f"cannot download {name}: {error}"
    else:
        return
    raise CheckpointError(message) from None


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
        return Path(os.path.expanduser(name))  # noqa: PTH111 - Path's raises where there is no such user
    with _hub_errors(name, revision):
        from huggingface_hub import snapshot_download

        patterns = [*SMALL_FILES, *(WEIGHT_FILES if weights else ())]
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
        if weights and not any(folder.glob(WEIGHT_FILES[0])):
            snapshot_download(name, revision=revision, allow_patterns=[*PICKLED_FILES])
        return folder


def find_file(name: str | Path) -> Path:
    """One file on this machine: a path, or the Hub's address of a file, which is downloaded once and then cached.

    Raises:
        CheckpointError: the Hub does not give it.
    """
    match = _HUB_FILE.match(str(name))
    if match is None or isinstance(name, Path):
        return Path(os.path.expanduser(name))  # noqa: PTH111 - as above
    with _hub_errors(match["name"], match["revision"]):
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(match["name"], match["file"], repo_type=match["kind"], revision=match["revision"]))


def fetch_headers(name: str, *, revision: str | None = None) -> list[Header]:
    """The headers of a Hub model's safetensors files, by range requests: the weights are not downloaded.

    Raises:
        CheckpointError: the Hub does not give them.
    """
    with _hub_errors(name, revision):
        from huggingface_hub import HfApi

        metadata = HfApi().get_safetensors_metadata(name, revision=revision)
    headers: list[Header] = []
    for file, part in metadata.files_metadata.items():
        tensors = {
            key: TensorInfo(Path(file), info.dtype, tuple(info.shape), *info.data_offsets)
            for key, info in part.tensors.items()
        }
        headers.append((tensors, dict(part.metadata or {})))
    return headers
