"""A model's name -> a folder here: a path, a Hub name, downloaded once and then cached, or the bundled model."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from glob import escape
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from mlx_vlm_mini.errors import CheckpointError

from . import bundled
from .folder import Header, choose_tensor_files, find_tensor_files, parse_header, read_index, what_else
from .pickled import read_pickled

_SHA256 = re.compile(r"[0-9a-f]{64}")
_HUB_FILE = re.compile(
    r"https://huggingface\.co/(?:(?P<kind>space|dataset|model)s/)?(?P<name>[^/]+/[^/]+)/(?:resolve|blob)/"
    r"(?P<revision>[^/]+)/(?P<file>[^?#]+)"
)
_HUB_NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(?P<folder>(?:/[\w.-]+)*)/?")
_HUB_PAGE = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<place>[^?#]*)")
_PLACE = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:/tree/(?P<revision>[^/]+)(?P<folder>(?:/[\w.-]+)*))?/?")
SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt")
"""Everything but the weights: configs, tokenizers, chat templates."""
_SETTINGS = (
    "config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json",
    "video_preprocessor_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.json", "chat_template.jinja", "model.safetensors.index.json", "pytorch_model.bin.index.json",
    "conversion.json", "LICENSE.txt",
)  # fmt: skip
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "qwen.tiktoken")
_MOST_BYTES = {**dict.fromkeys(_SETTINGS, 32 * 2**20), **dict.fromkeys(_VOCABULARIES, 128 * 2**20)}
"""The small files that are fetched from the Hub, and how large each may be: what is read here, and no more of it."""
INSTRUCTIONS = "qformer_tokenizer"
"""A folder in InstructBLIP's, with its Q-Former's tokenizer."""
_PART_OF = "{} is in the Hub's cache in part alone, and the Hub cannot be reached for the rest"


class HubName(NamedTuple):
    """What stands on the Hub: `folder` is inside the repository, "" for its uppermost one."""

    repo: str
    revision: str | None
    folder: str

    def inside(self, file: str) -> str:
        """A file's name in the repository."""
        return f"{self.folder}/{file}" if self.folder else file


def parse_hub_name(name: str) -> HubName | None:
    """`owner/model`, `owner/model/folder`, or the address of a model's page on the Hub; None where it is neither.

    Raises:
        CheckpointError: an address of another page.
    """
    page = _HUB_PAGE.match(name)
    match = _PLACE.fullmatch(unquote(page["place"])) if page is not None else _HUB_NAME.fullmatch(name)
    if match is None:
        if page is None:
            return None
        raise CheckpointError(f"{name} is no model's page: give owner/model, or https://huggingface.co/owner/model")
    found = match.groupdict()
    folder = (found["folder"] or "").strip("/")
    if {".", ".."} & {*folder.split("/"), *found["repo"].split("/")}:
        return None
    return HubName(found["repo"], found.get("revision"), folder)


def is_hub_name(name: str) -> bool:
    """Whether `name` can only be meant as a model on the Hub: of that form, and no folder here."""
    return parse_hub_name(name) is not None and not os.path.exists(name)  # noqa: PTH110 - never raises


def commit_of(folder: Path) -> str | None:
    """The commit that a folder of the Hub's cache holds; None elsewhere."""
    return next((part.name for part in (folder, *folder.parents) if part.parent.name == "snapshots"), None)


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
    """The folder of a checkpoint; a Hub name is downloaded (only files that are read here, by their names).

    Args:
        name: a path, a Hub name such as "llava-hf/llava-1.5-7b-hf" (a folder inside it may follow), the address of its
            page, or "demo".
        revision: branch, tag or commit on the Hub.
        weights: whether the tensors are needed, or only the small files.

    Raises:
        CheckpointError: there is no such folder, or the Hub does not give it, or a file is too large or arrives
            damaged.
    """
    if bundled.is_bundled(name):
        return bundled.FOLDER
    if isinstance(name, Path) or not is_hub_name(name):
        return expand_user(name)
    place = parse_hub_name(name)
    assert place is not None
    revision = revision or place.revision
    with _hub_errors(name, revision):
        sizes = _list(place, revision)
        small = _small_files(place, sizes)
        if sizes is not None and "config.json" not in small:
            reason = what_else(_names(place, sizes)) or ("" if small else "has no config.json on the Hub")
            if reason:
                raise CheckpointError(f"{'/'.join(filter(None, (place.repo, place.folder)))} {reason}")
        folder = _download(place, revision, small)
        config = folder / "config.json"
        if config.is_file() and b'"instructblip"' in config.read_bytes():
            inner = HubName(place.repo, place.revision, place.inside(INSTRUCTIONS))
            more = [f"{INSTRUCTIONS}/{file}" for file in _small_files(inner, sizes)]
            _download(place, commit_of(folder), more)
        if not weights:
            return folder
        if sizes is None:
            if not has_weights(folder):
                raise CheckpointError(_PART_OF.format(name))
            return folder
        chosen = _tensor_files(place, sizes, folder)
        if not all((folder / file).is_file() for file in chosen):
            before = set(folder.iterdir())
            _download(place, commit_of(folder), chosen)
            _verify(set(folder.iterdir()) - before)
        return folder


def _list(place: HubName, revision: str | None) -> dict[str, int] | None:
    """All files of a repository and their bytes; None where the Hub does not say."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError, RevisionNotFoundError  # type: ignore[attr-defined]

    try:
        found = HfApi().model_info(place.repo, revision=revision, files_metadata=True)
    except RevisionNotFoundError:
        raise
    except (OSError, HTTPError):  # what is in the cache may do
        return None
    return {file.rfilename: file.size or 0 for file in found.siblings or ()}


def _small_files(place: HubName, sizes: Mapping[str, int] | None) -> list[str]:
    """The small files of a folder that are fetched.

    Raises:
        CheckpointError: one is larger than any model's.
    """
    if sizes is None:
        return list(_MOST_BYTES)
    found = [file for file in _MOST_BYTES if place.inside(file) in sizes]
    for file in found:
        size, most = sizes[place.inside(file)], _MOST_BYTES[file]
        if size > most:
            raise CheckpointError(
                f"{place.repo}: {place.inside(file)} has {size >> 20} MB on the Hub, at most {most >> 20} MB are read: "
                "it was not fetched"
            )
    return found


def _names(place: HubName, sizes: Mapping[str, int]) -> set[str]:
    """The files of a folder, without those of folders in it."""
    start = f"{place.folder}/" if place.folder else ""
    return {file[len(start) :] for file in sizes if file.startswith(start) and "/" not in file[len(start) :]}


def _tensor_files(place: HubName, sizes: Mapping[str, int], folder: Path) -> list[str]:
    """The files of tensors that the Hub has.

    Raises:
        CheckpointError: there are none, or one that an index names is missing.
    """
    names = _names(place, sizes)
    chosen = choose_tensor_files(names, lambda index: read_index(folder / index))
    missing = [file for file in chosen if file not in names]
    if missing:
        raise CheckpointError(f"{place.repo} lacks {missing[0]} on the Hub, which its index names")
    if not chosen:
        raise CheckpointError(
            f"{place.repo} {what_else(names) or 'has neither model.safetensors nor pytorch_model.bin on the Hub'}"
        )
    return chosen


def has_weights(folder: Path) -> bool:
    """Whether all files of tensors are there."""
    files = find_tensor_files(folder)
    return bool(files) and all(file.is_file() for file in files)


def _download(place: HubName, revision: str | None, files: Sequence[str]) -> Path:
    """Fetch files of a folder, by their names there; give the part of the cache that holds them."""
    from huggingface_hub import snapshot_download

    patterns = [escape(place.inside(file)) for file in files]
    return Path(snapshot_download(place.repo, revision=revision, allow_patterns=patterns)) / place.folder


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


def fetch_headers(name: str, folder: Path, *, revision: str | None = None) -> list[Header]:
    """The headers of a Hub model's files of tensors, by range requests: the weights are not downloaded.

    Args:
        folder: what `find_folder` gave for it.

    Raises:
        CheckpointError: the Hub does not give them, or they are broken.
    """
    place = parse_hub_name(name)
    assert place is not None
    revision = commit_of(folder) or revision or place.revision
    with _hub_errors(name, revision):
        from huggingface_hub import HfApi, HfFileSystem

        sizes = _list(place, revision)
        if sizes is None:
            raise CheckpointError(_PART_OF.format(name))
        headers: list[Header] = []
        for file in _tensor_files(place, sizes, folder):
            shown, there = Path(name) / file, place.inside(file)
            if fnmatch(file, "*.bin"):  # a zip archive: its list of files is at the end
                with HfFileSystem().open(f"{place.repo}/{there}", "rb", revision=revision, block_size=2**20) as stream:
                    headers.append((read_pickled(shown, stream), {"format": "pt"}))
                continue
            part = HfApi().parse_safetensors_file_metadata(place.repo, there, revision=revision)
            content = {
                key: {"dtype": info.dtype, "shape": info.shape, "data_offsets": info.data_offsets}
                for key, info in part.tensors.items()
            }
            tensors, _ = parse_header(json.dumps(content).encode(), shown, 0)
            headers.append((tensors, dict(part.metadata or {})))
    return headers
