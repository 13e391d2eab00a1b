"""Models from the Hugging Face hub: pinned, resumable, checked.

huggingface_hub does the talking and keeps the cache, so HF_ENDPOINT, HF_TOKEN, HF_HOME and
HF_HUB_OFFLINE work as everywhere. Added here: revisions and SHA-256 of the models that the book
is about, large files that continue where a broken transfer stopped (the library starts them
again), and a checksum of every file before it is used for the first time.
"""

import errno
import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

from bitnet_edu.errors import DownloadError

MODEL = "microsoft/bitnet-b1.58-2B-4T"
LARGE = 10_000_000  # bytes from which a file is worth continuing
PATTERNS = ["*.safetensors", "*.gguf", "*.json", "*.jinja", "LICENSE*"]


class Pin(NamedTuple):
    """The revision that the book speaks of, and SHA-256 of its large files."""

    revision: str
    sha256: dict[str, str]


# "...-bf16" is not pinned: its revision was not known when this was written
PINS = {
    MODEL: Pin(
        "04c3b9ad9361b824064a1f25ea60a8be9599b127",
        {
            "model.safetensors": "8143ae115ed6babe5e5ada8fb8c5b769d8f417802b2db042ad98b4f7ed73975b",
            "tokenizer.json": "e134af98b985517b4f068e3755ae90d4e9cd2d45d328325dc503f1c6b2d06cc7",
        },
    ),
    f"{MODEL}-gguf": Pin(
        "a1f2f1c765812aa8af3f6eda4a313707064bba15",
        {
            "ggml-model-i2_s.gguf": (
                "4221b252fdd5fd25e15847adfeb5ee88886506ba50b8a34548374492884c2162"
            ),
        },
    ),
}


def is_hub_id(source: str) -> bool:
    """Whether `source` has the form owner/name."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", source) is not None


def download(
    repo: str = MODEL, revision: str | None = None, tqdm_class: type | None = None
) -> Path:
    """Fetch a model once and return its folder in the hub's cache; a cached one needs no network.

    revision: a branch, tag or commit; by default the pinned one, else "main". tqdm_class shows the
    progress, by default as the hub's bars on stderr. Raises DownloadError, whatever went wrong.
    """
    revision, checksums = _pinned(repo, revision)
    try:
        folder = _cached(repo, revision, checksums)
        if folder is None:
            folder = _fetch(repo, revision, tqdm_class)
        if not _is_complete(folder, checksums):
            raise DownloadError(
                f"{repo} holds no whole model in a format that this package reads "
                "(config.json and safetensors, or GGUF): check the name"
            )
        _verify(folder, checksums)
        return folder
    except DownloadError:
        raise
    except Exception as error:  # the libraries below raise a dozen unrelated classes
        raise DownloadError(_explain(error, repo)) from error


def is_cached(repo: str = MODEL) -> bool:
    """Whether `download` would find the whole model in the cache, without using the network."""
    return _cached(repo, *_pinned(repo, None)) is not None


def _pinned(repo: str, revision: str | None) -> tuple[str | None, dict[str, str]]:
    """The revision to ask for, and the checksums known for it."""
    pin = PINS.get(repo)
    revision = revision or (pin.revision if pin else None)
    return revision, pin.sha256 if pin and revision == pin.revision else {}


def _cached(repo: str, revision: str | None, checksums: dict[str, str]) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(
                repo, revision=revision, allow_patterns=PATTERNS, local_files_only=True
            )
        )
    except LocalEntryNotFoundError:
        return None
    return folder if _is_complete(folder, checksums) else None


def _is_complete(folder: Path, checksums: dict[str, str]) -> bool:
    """Whether all files of a model are there; what is in them is checked later."""
    if not all((folder / name).exists() for name in checksums):
        return False
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError):
            return False
    else:
        shards = {"model.safetensors"}
    return any(folder.glob("*.gguf")) or all(
        (folder / name).exists() for name in ("config.json", *shards)
    )


def _fetch(repo: str, revision: str | None, tqdm_class: type | None) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.utils import tqdm

    class Silent(tqdm):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options | {"disable": True})

    wanted = {"revision": revision, "allow_patterns": PATTERNS}
    plan = snapshot_download(repo, dry_run=True, tqdm_class=Silent, **wanted)
    missing = [file for file in plan if file.will_download]
    cache = Path(constants.HF_HUB_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    needed, free = sum(f.file_size or 0 for f in missing), shutil.disk_usage(cache).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"{needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free")
    for file in missing:
        if (file.file_size or 0) >= LARGE:
            _fetch_large(repo, file.filename, file.commit_hash, tqdm_class)
    # the rest is small, and the large files that it finds in the cache are only linked
    return Path(snapshot_download(repo, tqdm_class=Silent, **wanted))


def _fetch_large(repo: str, filename: str, revision: str, tqdm_class: type | None) -> None:
    """Put one file into the hub's cache, continuing a transfer that was cut off."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get, repo_folder_name
    from huggingface_hub.utils import WeakFileLock, build_hf_headers

    url = hf_hub_url(repo, filename, revision=revision)
    found = get_hf_file_metadata(url)
    if not found.etag or not re.fullmatch(r"[\w.-]+", found.etag):
        return  # not a hub that names its contents: leave it to the library
    headers = build_hf_headers()
    if urlparse(found.location).netloc != urlparse(url).netloc:
        headers.pop("authorization", None)  # the token is for the hub, not for its file servers
    cache, folder = Path(constants.HF_HUB_CACHE), repo_folder_name(repo_id=repo, repo_type="model")
    partial = cache / folder / "blobs" / f"{found.etag}.incomplete"
    lock = cache / ".locks" / folder / f"{found.etag}.lock"  # the library's own
    for path in (partial, lock):
        path.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        done = partial.stat().st_size if partial.exists() else 0
        if done > (found.size or done):
            partial.unlink()
            done = 0
        options = {"resume_size": done, "headers": headers, "expected_size": found.size}
        options |= {"tqdm_class": tqdm_class} if tqdm_class else {}
        try:
            with partial.open("ab") as file:
                http_get(found.location, file, displayed_filename=filename, **options)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                partial.unlink()
            raise
        partial.replace(partial.with_suffix(""))


def _verify(folder: Path, checksums: dict[str, str]) -> None:
    """Check every file that was not checked before; remove a wrong one and raise DownloadError.

    What a file should be is known from the pins, or from the name that the hub's cache gives its
    contents. The file of past checks holds sizes and times, so that later loads cost nothing.
    """
    record = folder.parent.parent / "bitnet_edu-verified.json"
    try:
        known = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    before = dict(known)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        key = path.relative_to(folder.parent).as_posix()
        mark = [path.stat().st_size, path.stat().st_mtime_ns]
        # a link into the cache, named after the contents; a plain file where there are no links
        blob = path.parent / path.readlink() if path.is_symlink() else path
        expected = checksums.get(path.relative_to(folder).as_posix(), blob.name)
        if known.get(key) == mark:
            continue
        if (found := _digest(blob, expected)) != expected:
            path.unlink()
            blob.unlink(missing_ok=True)
            raise DownloadError(
                f"{path.name} arrived damaged: its checksum is {found}, not {expected}. It was "
                "removed; download again, without a mirror if one is set in HF_ENDPOINT"
            )
        known[key] = mark
    if known != before:
        try:
            new = record.with_suffix(".new")
            new.write_text(json.dumps(known), encoding="utf-8")
            new.replace(record)
        except OSError:
            pass  # a cache that can't be written to is checked at every load


def _digest(path: Path, like: str) -> str:
    """SHA-256 (64 digits) or git's SHA-1 (40), whichever `like` is; `like` if it is neither."""
    if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", like):
        return like
    with path.open("rb") as file:
        if len(like) == 64:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
        return hashlib.file_digest(file, lambda: digest).hexdigest()


def _explain(error: BaseException, repo: str) -> str:
    """One sentence on what went wrong, one on what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

    hub, chain = constants.ENDPOINT, [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)
    for cause in chain:
        if getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return (
                f"no room on the disk for {repo} ({cause}): free some, or move the cache (HF_HOME)"
            )
        if isinstance(cause, PermissionError):
            return f"{cause.filename} cannot be written: allow it, or move the cache (HF_HOME)"
        if isinstance(cause, HFValidationError):
            return f"{repo!r} cannot be the name of a model on the hub: it should be owner/name"
        if isinstance(cause, OfflineModeIsEnabled):
            return (
                f"{repo} is not in the cache and HF_HUB_OFFLINE forbids to fetch it: unset that, "
                "or copy the cache of a machine that has the model"
            )
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status in (401, 403):
            return (
                f"{hub} refuses access to {repo} (status {status}): check the name, and if it is "
                "right, log in (`hf auth login`, or HF_TOKEN) with an account that may read it"
            )
        if status == 404:
            return f"{hub} has no {repo}, or not this revision or file of it: check the name"
        if status is not None:
            return f"{hub} answered with status {status}: try again later"
    reason = str(chain[-1]).strip().split("\n")[0] or type(chain[-1]).__name__
    return (
        f"the transfer from {hub} failed ({reason}): check the network, or set HF_ENDPOINT to a "
        "mirror, and try again; a large file continues where it stopped"
    )
