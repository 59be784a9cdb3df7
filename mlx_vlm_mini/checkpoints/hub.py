"""A model's name -> a folder here: a path, a Hub name, downloaded once and then cached, or the bundled model."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from mlx_vlm_mini.errors import CheckpointError

from . import bundled
from .folder import Header, find_tensor_files, parse_header
from .pickled import read_pickled

_SHA256 = re.compile(r"[0-9a-f]{64}")
_HUB_FILE = re.compile(
    r"https://huggingface\.co/(?:(?P<kind>space|dataset|model)s/)?(?P<name>[^/]+/[^/]+)/(?:resolve|blob)/"
    r"(?P<revision>[^/]+)/(?P<file>[^?#]+)"
)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt")
"""Everything but the weights: configs, tokenizers, chat templates."""
INSTRUCTIONS = "qformer_tokenizer"
"""A folder in InstructBLIP's, with its Q-Former's tokenizer."""
WEIGHT_FILES = ("model*.safetensors",)
PICKLED_FILES = ("pytorch_model*.bin",)
"""Fetched where there are no others."""


def is_hub_name(name: str) -> bool:
    """Whether `name` can only be meant as `owner/model`: of that form, and no folder here."""
    return _HUB_NAME.fullmatch(name) is not None and not Path(name).exists()


@contextmanager
def _hub_errors(name: str, revision: str | None) -> Iterator[None]:
    """Turn what huggingface_hub raises into one line."""
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        GatedRepoError,
        HfHubHTTPError,
        HTTPError,
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
    except (OSError, HTTPError, ValueError) as error:  # ValueError: a file name that points outside the cache
        message = f"cannot download {name}: {error}"
    else:
        return
    raise CheckpointError(message) from None


def expand_user(path: str | Path) -> Path:
    """A path with `~` replaced; as it is where there is no such user, for which Path's own raises."""
    return Path(os.path.expanduser(path))  # noqa: PTH111


def find_folder(name: str | Path, *, revision: str | None = None, weights: bool = True) -> Path:
    """The folder of a checkpoint; a Hub name is downloaded (only files of the kinds that are read here).

    Args:
        name: a path, a Hub name such as "llava-hf/llava-1.5-7b-hf", or "demo".
        revision: branch, tag or commit on the Hub.
        weights: whether the tensors are needed, or only the small files.

    Raises:
        CheckpointError: there is no such folder, or the Hub does not give it, or a file arrives damaged.
    """
    if bundled.is_bundled(name):
        return bundled.FOLDER
    if isinstance(name, Path) or not is_hub_name(name):
        return expand_user(name)
    with _hub_errors(name, revision):
        folder = _download(name, revision, SMALL_FILES)
        config = folder / "config.json"
        if config.is_file() and b'"instructblip"' in config.read_bytes():
            _download(name, folder.name, [f"{INSTRUCTIONS}/{pattern}" for pattern in SMALL_FILES], ignored=())
        if not weights or has_weights(folder):
            return folder
        before = set(folder.iterdir())
        for pattern in (*WEIGHT_FILES, *PICKLED_FILES):
            named = [file.name for file in find_tensor_files(folder)]
            if not any(fnmatch(file, pattern) for file in named):
                named = [pattern]
            _download(name, folder.name, named)
            if has_weights(folder):
                break
        _verify(set(folder.iterdir()) - before)
        return folder


def has_weights(folder: Path) -> bool:
    """Whether all files of tensors are there."""
    files = find_tensor_files(folder)
    return bool(files) and all(file.is_file() for file in files)


def _download(name: str, revision: str | None, patterns: Sequence[str], ignored: Sequence[str] = ("*/*",)) -> Path:
    """Fetch files of a repository, by default of its uppermost folder; give the part of the cache that holds them."""
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(name, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(ignored))
    )


def known_sha256(file: Path) -> str | None:
    """The sha256 that the Hub gives for a file in its cache, which stores large files under it; None elsewhere."""
    stored = file.resolve()
    return stored.name if file.is_symlink() and _SHA256.fullmatch(stored.name) else None


def find_file(name: str | Path) -> Path:
    """One file on this machine: a path, or the Hub's address of a file, which is downloaded once and then cached.

    Raises:
        CheckpointError: the Hub does not give it.
    """
    match = _HUB_FILE.match(str(name))
    if match is None or isinstance(name, Path):
        return expand_user(name)
    with _hub_errors(match["name"], match["revision"]):
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(match["name"], match["file"], repo_type=match["kind"], revision=match["revision"]))


def _verify(files: Iterable[Path]) -> None:
    """Compare what was downloaded with the Hub's checksums, which its own library does not.

    Raises:
        CheckpointError: a file is damaged; it is removed.
    """
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    known = {file: expected for file in sorted(files) if (expected := known_sha256(file)) is not None}
    total = sum(file.stat().st_size for file in known)
    with tqdm(total=total, unit="B", unit_scale=True, desc="Checking", disable=None) as bar:  # type: ignore[no-untyped-call]
        for file, expected in known.items():
            found = hashlib.sha256()
            buffer = memoryview(bytearray(2**18))
            with file.open("rb", buffering=0) as stream:
                while count := stream.readinto(buffer):
                    found.update(buffer[:count])
                    bar.update(count)
            if found.hexdigest() != expected:
                file.resolve().unlink()
                file.unlink()
                raise CheckpointError(
                    f"{file.name} arrived damaged: its sha256 is {found.hexdigest()[:12]}..., the Hub says "
                    f"{expected[:12]}...; run the command again, which downloads it again"
                )


def fetch_headers(name: str, *, revision: str | None = None) -> list[Header]:
    """The headers of a Hub model's files of tensors, by range requests: the weights are not downloaded.

    Raises:
        CheckpointError: the Hub does not give them, or they are broken.
    """
    with _hub_errors(name, revision):
        from huggingface_hub import HfApi
        from huggingface_hub.errors import NotASafetensorsRepoError

        try:
            metadata = HfApi().get_safetensors_metadata(name, revision=revision)
        except NotASafetensorsRepoError:
            return _fetch_pickled(name, revision)
    headers: list[Header] = []
    for file, part in sorted(metadata.files_metadata.items()):
        content = {
            key: {"dtype": info.dtype, "shape": info.shape, "data_offsets": info.data_offsets}
            for key, info in part.tensors.items()
        }
        tensors, _ = parse_header(json.dumps(content).encode(), Path(name) / file, 0)
        headers.append((tensors, dict(part.metadata or {})))
    return headers


def _fetch_pickled(name: str, revision: str | None) -> list[Header]:
    """Of `.bin` files the list of files and the pickle, which stand at the archive's end."""
    from huggingface_hub import HfApi, HfFileSystem

    names = [file for file in HfApi().list_repo_files(name, revision=revision) if fnmatch(file, PICKLED_FILES[0])]
    if not names:
        raise CheckpointError(f"{name} has no readable safetensors files on the Hub, and no pytorch_model.bin")
    headers: list[Header] = []
    for file in sorted(names):
        with HfFileSystem().open(f"{name}/{file}", "rb", revision=revision, block_size=2**20) as stream:
            headers.append((read_pickled(Path(name) / file, stream), {"format": "pt"}))
    return headers
