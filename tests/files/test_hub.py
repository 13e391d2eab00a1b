"""Downloads from a stand-in for the hub: once, resumed, checked, and every failure explained."""

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf_files import write_real
from hub_server import COMMIT, Hub, entry, running
from huggingface_hub import constants, file_download
from huggingface_hub.utils import WeakFileLock

from bitnet_edu import CheckpointError, DownloadError, cli, load
from bitnet_edu.files import hub as module
from bitnet_edu.files.hub import MODEL, PINS, Pin, download, is_cached
from bitnet_edu.files.source import TINY, find_model

NAME = "someone/tiny-bitnet"
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    """The embedded model's files, and one that nobody needs."""
    found = {path.name: path.read_bytes() for path in TINY.iterdir() if path.suffix != ".md"}
    return found | {"modeling_bitnet.py": b"raise SystemExit", "pytorch_model.bin": b"\x80pickle"}


@pytest.fixture
def hub(files, tmp_path, monkeypatch):
    """A hub that has the model, an empty cache, and files large from 100 kB on."""
    with running() as hub:
        hub.repos[NAME] = dict(files)
        use(hub, tmp_path / "cache", monkeypatch)
        yield hub


def use(hub: Hub, cache: Path, monkeypatch) -> None:
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # so much arrives or is lost
    monkeypatch.setattr(module, "LARGE", 100_000)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the library's retries


def leftovers(cache: Path) -> list[str]:
    """Files that are no longer wanted when a download is over."""
    return [path.name for path in cache.rglob("*") if path.name.endswith((".incomplete", ".new"))]


def pin(monkeypatch, hub: Hub, **changed: str) -> None:
    sums = {WEIGHTS: hashlib.sha256(hub.repos[NAME][WEIGHTS]).hexdigest()} | changed
    monkeypatch.setitem(PINS, NAME, Pin(COMMIT, sums))


def test_the_pins_are_those_of_the_facts():
    assert PINS[MODEL].revision == COMMIT
    for wanted in PINS.values():
        assert re.fullmatch("[0-9a-f]{40}", wanted.revision)
        assert all(re.fullmatch("[0-9a-f]{64}", checksum) for checksum in wanted.sha256.values())


def test_a_model_is_fetched_once_and_loads(hub, files, tmp_path):
    assert not is_cached(NAME)
    folder = download(NAME)
    names = {path.name for path in folder.iterdir()}
    assert names == {name for name in files if not name.endswith((".py", ".bin"))}
    assert all((folder / name).read_bytes() == files[name] for name in names)
    assert not leftovers(tmp_path / "cache")
    assert [name for name, _ in hub.transfers] == [WEIGHTS]

    asked = len(hub.asked)
    assert is_cached(NAME)
    assert find_model(NAME) == download(NAME) == folder
    assert len(hub.asked) == asked, "a cached model asks the network for nothing"
    ids = [1, 2, 3]
    np.testing.assert_array_equal(load(NAME).logits(ids), load("tiny").logits(ids))


def test_a_gguf_repository_is_a_model_too(hub, tmp_path):
    path = write_real(tmp_path / "ggml-model-i2_s.gguf")
    hub.repos["someone/gguf"] = {path.name: path.read_bytes(), "README.md": b"# hi"}
    assert find_model("someone/gguf").read_bytes() == path.read_bytes()
    assert load("someone/gguf").config == load(str(path)).config


def test_the_token_goes_to_the_hub_and_not_to_its_file_servers(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    download(NAME)
    assert hub.tokens == {("hub", "Bearer hf_secret"), ("cdn", None)}


def test_a_pinned_model_is_asked_for_at_its_revision(hub, monkeypatch):
    pin(monkeypatch, hub)
    hub.revisions = (COMMIT,)
    assert download(NAME).name == COMMIT
    assert not [path for _, path in hub.asked if "main" in path]


def test_another_revision_may_be_named(hub, monkeypatch):
    pin(monkeypatch, hub, **{WEIGHTS: "0" * 64})  # the pin is for one revision only
    hub.revisions = ("main", COMMIT)
    assert download(NAME, "main").exists()
    assert [path for _, path in hub.asked if "main" in path]


# --- transfers that go wrong ---------------------------------------------------------------------


def test_a_dropped_connection_continues_where_it_stopped(hub, files):
    size = len(files[WEIGHTS])
    hub.cut_after = [size // 3, size // 5]
    assert (download(NAME) / WEIGHTS).read_bytes() == files[WEIGHTS]
    first, *later = [span for _, span in hub.transfers]
    starts = [int(span.removeprefix("bytes=").removesuffix("-")) for span in later]
    assert first is None
    assert starts == pytest.approx([size // 3, size // 3 + size // 5], abs=2000)


def stop_after_the_first_cut(monkeypatch):
    """As if the program were killed: the library's own retries do not come."""
    original = file_download.http_get
    monkeypatch.setattr(
        file_download, "http_get", lambda *a, **k: original(*a, **k | {"_nb_retries": 0})
    )
    return original


def test_a_broken_download_is_reported_and_the_next_one_continues(
    hub, files, tmp_path, monkeypatch
):
    size = len(files[WEIGHTS])
    original = stop_after_the_first_cut(monkeypatch)
    hub.cut_after = [size // 2] + [0] * 20
    with pytest.raises(DownloadError, match="try again; a large file continues where it stopped"):
        download(NAME)
    partial = next((tmp_path / "cache").rglob("*.incomplete"))
    kept = partial.stat().st_size
    assert size // 2 - 1000 < kept <= size // 2
    assert not list((tmp_path / "cache").rglob(WEIGHTS)), "half a file is not taken for good"

    monkeypatch.setattr(file_download, "http_get", original)
    hub.cut_after, hub.transfers = [], []
    assert (download(NAME) / WEIGHTS).read_bytes() == files[WEIGHTS]
    assert hub.transfers == [(WEIGHTS, f"bytes={kept}-")]
    assert not leftovers(tmp_path / "cache")


KILLED = f"""
from huggingface_hub import constants
from bitnet_edu.files import hub
constants.DOWNLOAD_CHUNK_SIZE, hub.LARGE = 1000, 100_000
print(hub.download({NAME!r}))
"""


def test_a_killed_download_continues_too(hub, files, tmp_path):
    """A process that has no time to tidy up."""
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "cache")}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    hub.stall_after = len(files[WEIGHTS]) // 2
    run = [sys.executable, "-c", KILLED]
    with subprocess.Popen(run, env=environment, stdout=subprocess.DEVNULL) as process:
        kept = 0
        while kept < hub.stall_after - 100_000:
            kept = sum(path.stat().st_size for path in tmp_path.rglob("*.incomplete"))
            assert process.poll() is None
            hub.released.wait(0.05)
        process.kill()
    hub.released.set()
    hub.stall_after = None
    kept = next(tmp_path.rglob("*.incomplete")).stat().st_size
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=True)
    assert (Path(done.stdout.strip()) / WEIGHTS).read_bytes() == files[WEIGHTS]
    assert hub.transfers == [(WEIGHTS, None), (WEIGHTS, f"bytes={kept}-")]


def test_a_server_that_cannot_continue_starts_again(hub, files, monkeypatch):
    hub.ranges = False
    hub.cut_after = [len(files[WEIGHTS]) // 2]
    assert (download(NAME) / WEIGHTS).read_bytes() == files[WEIGHTS]


def test_a_partial_file_longer_than_the_whole_is_not_trusted(hub, files, tmp_path, monkeypatch):
    original = stop_after_the_first_cut(monkeypatch)
    hub.cut_after = [1000] + [0] * 20
    with pytest.raises(DownloadError):
        download(NAME)
    partial = next((tmp_path / "cache").rglob("*.incomplete"))
    partial.write_bytes(bytes(len(files[WEIGHTS]) + 1))
    monkeypatch.setattr(file_download, "http_get", original)
    hub.cut_after = []
    assert (download(NAME) / WEIGHTS).read_bytes() == files[WEIGHTS]


def test_a_damaged_file_is_removed_and_the_next_download_is_whole(hub, files, tmp_path):
    hub.damage = True
    with pytest.raises(DownloadError, match=f"{WEIGHTS} arrived damaged: its checksum is"):
        download(NAME)
    assert not list((tmp_path / "cache").rglob(WEIGHTS))
    hub.damage = False
    assert (download(NAME) / WEIGHTS).read_bytes() == files[WEIGHTS]


def test_a_partial_file_that_is_damaged_is_noticed(hub, files, tmp_path, monkeypatch):
    original = stop_after_the_first_cut(monkeypatch)
    hub.cut_after = [100_000] + [0] * 20
    with pytest.raises(DownloadError):
        download(NAME)
    next((tmp_path / "cache").rglob("*.incomplete")).write_bytes(bytes(100_000))
    monkeypatch.setattr(file_download, "http_get", original)
    hub.cut_after = []
    with pytest.raises(DownloadError, match="arrived damaged"):
        download(NAME)
    assert (download(NAME) / WEIGHTS).read_bytes() == files[WEIGHTS]


def test_a_mirror_that_serves_another_file_is_caught_by_the_pin(hub, monkeypatch):
    """Everything fits together, but it is not the model that the book speaks of."""
    pin(monkeypatch, hub, **{WEIGHTS: "0" * 64})
    with pytest.raises(DownloadError, match=r"not 0{64}.* without a mirror"):
        download(NAME)


def test_a_small_file_changed_in_the_cache_is_noticed(hub):
    """Whoever wrote the cache, a file is checked before it is used for the first time."""
    folder = download(NAME)
    for record in folder.parent.parent.glob("bitnet_edu-*.json"):
        record.unlink()
    (folder / "config.json").resolve().write_text('{"model_type": "evil"}')
    with pytest.raises(DownloadError, match=r"config\.json arrived damaged"):
        download(NAME)
    assert download(NAME) == folder


def test_files_are_checked_once_and_again_when_they_change(hub, monkeypatch):
    folder = download(NAME)
    checked = []
    original = module._digest
    monkeypatch.setattr(module, "_digest", lambda *a: checked.append(a[0]) or original(*a))
    download(NAME)
    assert not checked
    weights = (folder / WEIGHTS).resolve()
    os.utime(weights, ns=(1, 1))
    download(NAME)
    assert [path.name for path in checked] == [weights.name]


def test_an_incomplete_snapshot_is_completed(hub, files):
    folder = download(NAME)
    (folder / WEIGHTS).resolve().unlink()
    (folder / WEIGHTS).unlink()
    assert (download(NAME) / WEIGHTS).read_bytes() == files[WEIGHTS]


def test_a_file_that_the_library_takes_for_whole_is_not(hub, files, tmp_path, monkeypatch):
    """As its oldest versions do when a connection breaks; with names that tell no checksum."""
    original = file_download.http_get

    def cut_off(url, file, **options) -> None:
        if "tokenizer_config" in url:
            file.write(files["tokenizer_config.json"][:100])
        else:
            original(url, file, **options)

    monkeypatch.setattr(file_download, "http_get", cut_off)
    monkeypatch.setattr(module, "_digest", lambda path, like: like)
    with pytest.raises(DownloadError, match=r"tokenizer_config\.json arrived incomplete \(100 of"):
        download(NAME)
    assert not is_cached(NAME)
    monkeypatch.setattr(file_download, "http_get", original)
    assert (download(NAME) / "tokenizer_config.json").read_bytes() == files["tokenizer_config.json"]


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
def test_a_snapshot_without_one_of_its_small_files_is_completed(hub, files, name):
    folder = download(NAME)
    (folder / name).unlink()
    assert not is_cached(NAME)
    assert (download(NAME) / name).read_bytes() == files[name]


def test_what_others_put_into_the_cache_must_have_the_tokenizers_settings(hub, files):
    folder = download(NAME)
    (folder.parent.parent / module.RECORD).unlink()
    assert is_cached(NAME)
    (folder / "tokenizer_config.json").unlink()
    assert not is_cached(NAME)
    assert not module._is_complete(folder, {}), "which new versions of the library see too"


def test_a_model_that_never_had_a_tokenizer_is_whole(hub, files):
    hub.repos[NAME] = {name: files[name] for name in ("config.json", WEIGHTS)}
    folder = download(NAME)
    asked = len(hub.asked)
    assert download(NAME) == folder
    assert len(hub.asked) == asked


def test_what_killed_downloads_left_is_removed_unless_somebody_writes_it(hub, files, tmp_path):
    blobs = tmp_path / "cache" / "models--someone--tiny-bitnet" / "blobs"
    blobs.mkdir(parents=True)
    etags = [entry(name, files[name])["oid"] for name in ("config.json", "tokenizer.json")]
    dead, living = (blobs / f"{etag}.1a2b3c4d.incomplete" for etag in etags)
    unfinished = blobs / f"{'e' * 40}.incomplete"  # of another revision: it may be continued
    for path in (dead, living, unfinished):
        path.write_bytes(b"half")
    download(NAME)
    (tmp_path / "cache" / "models--someone--tiny-bitnet" / "snapshots" / COMMIT / WEIGHTS).unlink()
    assert set(leftovers(tmp_path / "cache")) == {unfinished.name}
    for path in (dead, living):
        path.write_bytes(b"half")
    lock = tmp_path / "cache" / ".locks" / blobs.parent.name / f"{etags[1]}.lock"
    with WeakFileLock(lock):
        download(NAME)
        assert set(leftovers(tmp_path / "cache")) == {unfinished.name, living.name}


# --- everything that can be refused --------------------------------------------------------------


def test_a_cached_model_needs_no_network(hub, monkeypatch):
    folder = download(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert download(NAME) == folder


def test_offline_mode_without_the_model(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError, match="not in the cache and HF_HUB_OFFLINE forbids"):
        download(NAME)
    assert not hub.asked


def test_no_network(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DownloadError, match=r"refused.*: check the network, or set HF_ENDPOINT"):
        download(NAME)


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (401, "", "refuses access to .* log in"),
        (401, "GatedRepo", "refuses access to .* log in"),
        (403, "GatedRepo", "refuses access to .* log in"),
        (403, "", "refuses access to .* log in"),
        (404, "RepoNotFound", "has no someone/tiny-bitnet"),
        (404, "RevisionNotFound", "has no someone/tiny-bitnet, or not this revision"),
        (500, "", "answered with status 500: try again later"),
        (503, "", "answered with status 503: try again later"),
        (407, "", "the proxy wants a name and a password"),
        (429, "", "was asked too often .* wait some minutes"),
    ],
)
def test_what_the_hub_refuses(hub, status, code, message):
    hub.status, hub.error_code = status, code
    with pytest.raises(DownloadError, match=message) as caught:
        download(NAME)
    assert "\n" not in str(caught.value)


def test_a_login_page_instead_of_the_hub(hub):
    hub.status, hub.page = 200, b"<!DOCTYPE html><html><body>Please log in</body></html>"
    with pytest.raises(DownloadError, match="is not a hub: if this network has a login page"):
        download(NAME)


@pytest.mark.parametrize(
    ("endpoint", "message"),
    [
        ("nonsense", "'nonsense' is no address of a hub .* HF_ENDPOINT"),
        ("http://no-such-host.invalid", "the address of .*invalid can't be found .* HF_ENDPOINT"),
        ("https", "not secure .* clock"),  # this server's address, which knows no TLS
    ],
)
def test_wrong_addresses(hub, monkeypatch, endpoint, message):
    endpoint = hub.url.replace("http", "https") if endpoint == "https" else endpoint
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    with pytest.raises(DownloadError, match=message):
        download(NAME)


LOCAL_FAULTS = {
    errno.EROFS: "can only be read",
    errno.EIO: "fails",
    errno.ENAMETOOLONG: "shorter name",
    errno.ENOTDIR: "not a folder",
    errno.EEXIST: "a file stands",
    errno.EACCES: "allow it",
    errno.EPERM: "allow it",
    errno.EMFILE: "ulimit -n",
    errno.EDQUOT: "free some room",
    errno.ENOSPC: "free some room",
}


@pytest.mark.parametrize("code", LOCAL_FAULTS, ids=errno.errorcode.get)
def test_faults_of_this_machine_are_not_the_networks(hub, monkeypatch, code):
    def fail(*args, **options) -> None:
        raise OSError(code, os.strerror(code), "/somewhere/cache/hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(DownloadError, match=LOCAL_FAULTS[code]) as caught:
        download(NAME)
    assert "network" not in str(caught.value)
    assert "HF_HOME" in str(caught.value) or code == errno.EMFILE


def test_a_file_where_the_cache_should_be(hub, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    with pytest.raises(DownloadError, match="not a folder; move the cache"):
        download(NAME)


def test_a_path_is_no_name_on_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("./model", "../model", "models/none.gguf"):
        with pytest.raises(CheckpointError, match=r"none\.gguf is missing|no model at"):
            load(path)
    assert not hub.asked


def test_a_name_that_is_neither_folder_nor_model(hub):
    with pytest.raises(DownloadError, match=r"has no nobody/nothing.*no folder is named"):
        load("nobody/nothing")


def test_a_name_that_cannot_be(hub):
    with pytest.raises(DownloadError, match="cannot be the name of a model"):
        download("a--b/..c")


def test_a_repository_without_a_model(hub, files):
    hub.repos["someone/else"] = {"config.json": files["config.json"], "tokenizer.json": b"{}"}
    with pytest.raises(DownloadError, match="holds no whole model"):
        download("someone/else")


def test_a_full_disk_before_and_during_the_transfer(hub, tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free._replace(free=1000))
    with pytest.raises(DownloadError, match="no room on the disk"):
        download(NAME)
    assert not hub.transfers
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)

    def full(url, file, **options):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(file_download, "http_get", full)
    with pytest.raises(DownloadError, match="no room on the disk"):
        download(NAME)
    assert not leftovers(tmp_path / "cache")


def test_the_command_prints_the_folder(hub, files, capsys):
    assert cli.main(["download", NAME]) == 0
    assert capsys.readouterr().out.strip() == str(download(NAME))
    assert cli.main(["download", NAME, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    size = sum(len(data) for name, data in files.items() if not name.endswith((".py", ".bin")))
    assert told == {"repo": NAME, "path": str(download(NAME)), "revision": COMMIT, "bytes": size}
    assert cli.main(["download", "nobody/nothing"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_environment_variables_are_respected(hub, files, tmp_path):
    """In a process of its own, because the library reads them when it is imported."""
    code = f"from bitnet_edu.files.hub import download; print(download({NAME!r}))"
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).is_relative_to(tmp_path / "home")
    assert (Path(done.stdout.strip()) / WEIGHTS).read_bytes() == files[WEIGHTS]
    hub.status = 500
    environment["HF_HUB_OFFLINE"] = "1"
    again = subprocess.run(run, env=environment, capture_output=True, text=True, check=True)
    assert again.stdout == done.stdout
