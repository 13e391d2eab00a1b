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
import socket
import ssl
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

from bitnet_edu.errors import DownloadError, InputError

MODEL = "microsoft/bitnet-b1.58-2B-4T"
LARGE = 10_000_000  # bytes from which a file is worth continuing
PATTERNS = ["*.safetensors", "*.gguf", "*.json", "*.jinja", "LICENSE*"]
RECORD = "bitnet_edu-verified.json"  # in a model's folder of the cache: what belongs there
ELSEWHERE = "move the cache (HF_HOME) to another place"
LOCAL_FAULTS = {  # of this machine, not of the network
    errno.ENOSPC: f"free some room, or {ELSEWHERE}",
    errno.EDQUOT: f"free some room, or {ELSEWHERE}",
    errno.EROFS: f"the disk can only be read; {ELSEWHERE}",
    errno.EACCES: f"allow it, or {ELSEWHERE}",
    errno.EPERM: f"allow it, or {ELSEWHERE}",
    errno.EIO: f"the disk, or the connection to it, fails; {ELSEWHERE}",
    errno.ENAMETOOLONG: f"{ELSEWHERE}, of a shorter name",
    errno.ENOTDIR: f"a part of the path is not a folder; {ELSEWHERE}",
    errno.EEXIST: f"a file stands where a folder must be; remove it, or {ELSEWHERE}",
    errno.ELOOP: f"links lead round in a circle; {ELSEWHERE}",
    errno.EMFILE: "close other files or models, or raise `ulimit -n`",
    errno.ENFILE: "close other programs",
    errno.ENOMEM: "close other programs",
}


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
    """Whether `source` has the form owner/name, and not of a path such as ./name."""
    return re.fullmatch(r"(?!\.{1,2}/)[\w.-]+/[\w.-]+", source) is not None


def download(
    repo: str = MODEL, revision: str | None = None, tqdm_class: type | None = None
) -> Path:
    """Fetch a model once and return its folder in the hub's cache; a cached one needs no network.

    revision: a branch, tag or commit; by default the pinned one, else "main". tqdm_class shows the
    progress, by default as the hub's bars on stderr. Raises DownloadError, whatever went wrong.
    """
    if not isinstance(repo, str) or not isinstance(revision, str | None):
        raise InputError(f"a model on the hub is named by text, not by {repo!r} and {revision!r}")
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
    with suppress(Exception):
        return _cached(repo, *_pinned(repo, None)) is not None
    return False


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
    """Whether all files of a model are there; what is in them is checked later.

    All are those that the hub listed when we fetched them. Of what others put into the cache is
    asked what the model can't answer without: the tokenizer's settings too.
    """
    listed = (key.partition("/") for key in _read_record(folder))
    names = {name for revision, _, name in listed if revision == folder.name}
    if not all((folder / name).exists() for name in (*checksums, *names)):
        return False
    index = folder / "model.safetensors.index.json"
    shards = {"model.safetensors"}
    if index.exists():
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError):
            return False
    needed = {"config.json", *shards}
    needed |= set() if names else {"tokenizer.json", "tokenizer_config.json"}
    return any(folder.glob("*.gguf")) or all((folder / name).exists() for name in needed)


def _read_record(folder: Path) -> dict[str, Any]:
    """ "REVISION/FILE" -> [size, time of change] when its checksum was right, or null before."""
    try:
        known = json.loads((folder.parent.parent / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _write_record(folder: Path, known: dict[str, Any]) -> None:
    record = folder.parent.parent / RECORD
    with suppress(OSError):  # a cache that can't be written to is checked at every load
        new = record.with_suffix(".new")
        new.write_text(json.dumps(known), encoding="utf-8")
        new.replace(record)


def _fetch(repo: str, revision: str | None, tqdm_class: type | None) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.file_download import repo_folder_name
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
        found = f"No room: {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free"
        raise OSError(errno.ENOSPC, found, str(cache))
    home = cache / repo_folder_name(repo_id=repo, repo_type="model")
    if plan:
        folder = home / "snapshots" / plan[0].commit_hash
        home.mkdir(exist_ok=True)
        known = _read_record(folder)
        listed = (f"{folder.name}/{file.filename}" for file in plan)
        _write_record(folder, dict.fromkeys(listed) | known)
    for file in missing:
        if (file.file_size or 0) >= LARGE:
            _fetch_large(repo, file.filename, file.commit_hash, tqdm_class)
    # the rest is small, and the large files that it finds in the cache are only linked
    folder = Path(snapshot_download(repo, tqdm_class=Silent, **wanted))
    for file in plan:
        _refuse_cut_off(folder / file.filename, file.file_size)
    _remove_abandoned(home)
    return folder


def _refuse_cut_off(path: Path, size: int | None) -> None:
    """Old versions of the library take what came before a connection broke for the whole file."""
    found = _size(path)
    if size is not None and found != size:
        _remove(path)
        raise DownloadError(
            f"{path.name} arrived incomplete ({found:,} of {size:,} bytes) and was removed: "
            "download again"
        )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _remove(path: Path) -> None:
    """Remove a file of a snapshot, and what a link leads to."""
    blob = path.parent / path.readlink() if path.is_symlink() else path
    path.unlink(missing_ok=True)
    blob.unlink(missing_ok=True)


def _remove_abandoned(home: Path) -> None:
    """Remove what killed downloads left and nobody will continue: the library names it anew each
    time. Only where the library's lock is free, so that nobody is writing there.
    """
    from huggingface_hub.utils import WeakFileLock

    for partial in (home / "blobs").glob("*.incomplete"):
        etag = partial.name.split(".")[0]
        to_continue = partial.name == f"{etag}.incomplete" and not (home / "blobs" / etag).exists()
        lock = home.parent / ".locks" / home.name / f"{etag}.lock"
        if not to_continue:
            with suppress(Exception), WeakFileLock(lock, timeout=0.01):
                partial.unlink(missing_ok=True)


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
    options = {"headers": headers, "expected_size": found.size, "displayed_filename": filename}
    options |= {"tqdm_class": tqdm_class} if tqdm_class else {}
    with WeakFileLock(lock):
        finished = False
        while not finished:
            done = _size(partial)
            if done > (found.size or done):
                partial.unlink()
                done = 0
            try:
                with partial.open("ab") as file:
                    http_get(found.location, file, resume_size=done, **options)
                finished = True
            except Exception as error:
                if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                    partial.unlink(missing_ok=True)
                    raise
                if _size(partial) <= done:
                    raise  # else something came before it broke, and old libraries stop here
        partial.replace(partial.with_suffix(""))


def _verify(folder: Path, checksums: dict[str, str]) -> None:
    """Check every file that was not checked before; remove a wrong one and raise DownloadError.

    What a file should be is known from the pins, or from the name that the hub's cache gives its
    contents. The file of past checks holds sizes and times, so that later loads cost nothing.
    """
    known = _read_record(folder)
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
            _remove(path)
            raise DownloadError(
                f"{path.name} arrived damaged: its checksum is {found}, not {expected}. It was "
                "removed; download again, without a mirror if one is set in HF_ENDPOINT"
            )
        known[key] = mark
    if known != before:
        _write_record(folder, known)


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
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)
    for explain in (_explain_disk, _explain_answer, _explain_connection):
        for cause in chain:
            if text := explain(cause, repo):
                return text
    return _transfer_failed(chain[-1])


def _explain_disk(cause: BaseException, repo: str) -> str | None:
    code = getattr(cause, "errno", None)
    if not isinstance(cause, OSError) or code not in LOCAL_FAULTS:
        return None
    if code in (errno.ENOSPC, errno.EDQUOT):
        return f"no room on the disk for {repo} ({cause}): {LOCAL_FAULTS[code]}"
    if code in (errno.EACCES, errno.EPERM) and not cause.filename:
        return None  # a connection that is not allowed
    return (
        f"{cause.filename or 'the cache'} cannot be used ({cause.strerror}): {LOCAL_FAULTS[code]}"
    )


def _explain_answer(cause: BaseException, repo: str) -> str | None:
    """What the hub, or whoever answered for it, says."""
    from huggingface_hub import constants
    from huggingface_hub.errors import FileMetadataError, HFValidationError, OfflineModeIsEnabled

    hub, status = constants.ENDPOINT, getattr(getattr(cause, "response", None), "status_code", None)
    if isinstance(cause, HFValidationError):
        return f"{repo!r} cannot be the name of a model on the hub: it should be owner/name"
    if isinstance(cause, OfflineModeIsEnabled):
        return (
            f"{repo} is not in the cache and HF_HUB_OFFLINE forbids to fetch it: unset that, "
            "or copy the cache of a machine that has the model"
        )
    if isinstance(cause, json.JSONDecodeError | FileMetadataError | UnicodeDecodeError):
        return (
            f"what answers at {hub} is not a hub: if this network has a login page, log in there "
            "with a browser; else check HF_ENDPOINT"
        )
    if status in (401, 403):
        return (
            f"{hub} refuses access to {repo} (status {status}): check the name, and if it is "
            "right, log in (`hf auth login`, or HF_TOKEN) with an account that may read it"
        )
    if status == 404:
        return f"{hub} has no {repo}, or not this revision or file of it: check the name"
    if status == 407:
        return f"the proxy wants a name and a password (status {status}): give them in HTTPS_PROXY"
    if status == 429:
        return (
            f"{hub} was asked too often (status {status}): wait some minutes, or log in "
            "(`hf auth login`, or HF_TOKEN), which allows more"
        )
    if status is not None:
        return f"{hub} answered with status {status}: try again later"
    return None


def _explain_connection(cause: BaseException, repo: str) -> str | None:
    """Why no answer came. The names of errors are those of the library's own library, httpx."""
    from huggingface_hub import constants

    hub, kind = constants.ENDPOINT, type(cause).__name__
    if kind in ("UnsupportedProtocol", "InvalidURL", "LocalProtocolError"):
        return f"{hub!r} is no address of a hub ({cause}): unset HF_ENDPOINT, or mend it"
    if isinstance(cause, ssl.SSLError) or "CERTIFICATE_VERIFY_FAILED" in str(cause):
        return (
            f"the connection to {hub} is not secure ({cause}): check this machine's clock, and if "
            "the network's owner reads along, name his certificate in SSL_CERT_FILE"
        )
    if kind == "ProxyError":
        return f"the proxy does not connect to {hub} ({cause}): check HTTPS_PROXY"
    if isinstance(cause, socket.gaierror):
        return (
            f"the address of {hub} can't be found ({cause}): check the network, or HF_ENDPOINT if "
            "it is set"
        )
    if isinstance(cause, TimeoutError) or "Timeout" in kind:
        return (
            f"{hub} did not answer in time: check the network, or allow more seconds in "
            "HF_HUB_DOWNLOAD_TIMEOUT; a large file continues where it stopped"
        )
    return None


def _transfer_failed(cause: BaseException) -> str:
    from huggingface_hub import constants

    reason = str(cause).strip().split("\n")[0] or type(cause).__name__
    return (
        f"the transfer from {constants.ENDPOINT} failed ({reason}): check the network, or set "
        "HF_ENDPOINT to a mirror, and try again; a large file continues where it stopped"
    )
