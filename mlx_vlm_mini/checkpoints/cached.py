"""The models in the Hub's cache of this machine: which they are, and their removal."""

from dataclasses import dataclass
from pathlib import Path

from mlx_vlm_mini.errors import CheckpointError


@dataclass(frozen=True)
class Cached:
    """A model in the Hub's cache.

    Attributes:
        name: on the Hub.
        folder: of its newest revision that is there.
        bytes: of all that is kept of it.
        revisions: commits that are kept.
    """

    name: str
    folder: Path
    bytes: int
    revisions: tuple[str, ...]


def list_cached() -> list[Cached]:
    """All models in the cache, by name; those whose files are not all there, too."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        found = scan_cache_dir()
    except CacheNotFound:
        return []
    models = []
    for repo in found.repos:
        if repo.repo_type != "model" or not repo.revisions:
            continue
        main = repo.refs.get("main") or max(repo.revisions, key=lambda revision: revision.last_modified)
        hashes = tuple(sorted(revision.commit_hash for revision in repo.revisions))
        models.append(Cached(repo.repo_id, main.snapshot_path, repo.size_on_disk, hashes))
    return sorted(models, key=lambda model: model.name.lower())


def find_cached(name: str) -> Cached:
    """A model in the cache.

    Raises:
        CheckpointError: it is not there.
    """
    models = list_cached()
    found = next((model for model in models if model.name == name), None)
    if found is None:
        names = ", ".join(model.name for model in models) or "nothing"
        raise CheckpointError(f"{name} is not in the Hub's cache, which holds {names}")
    return found


def remove_cached(model: Cached) -> int:
    """Delete a model from the cache, all its revisions; the bytes that were freed.

    Raises:
        OSError: the files cannot be deleted.
    """
    from huggingface_hub import scan_cache_dir

    strategy = scan_cache_dir().delete_revisions(*model.revisions)
    strategy.execute()
    return strategy.expected_freed_size
