"""What a stranger relies on: pins, notebooks, the table of contents, links, a light import."""

import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
VENDOR = "book/_static/vendor/"  # other projects' files, unchanged
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text())

URL, BRANCH = CONFIG["repository"]["url"], CONFIG["repository"]["branch"]
# An archive, because git may be missing; Colab has its own torch, which satisfies the package.
COLAB_CELL = f"""import importlib.util

if importlib.util.find_spec("bitnet_edu") is None:  # on Colab
    %pip install -q "bitnet-edu[ui,verify] @ {URL}/archive/refs/heads/{BRANCH}.zip\""""


def tracked_files() -> list[str]:
    """Everything under version control, without the vendored files."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, so there is no list of files to check")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    names = [name for name in listed.stdout.decode().split("\0") if name]
    return [name for name in names if not name.startswith(VENDOR) and (ROOT / name).is_file()]


def chapters() -> list[str]:
    """The files of _toc.yml in reading order."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    return [chapter["file"] for part in toc["parts"] for chapter in part["chapters"]]


def locked() -> dict[str, list[str]]:
    """Package -> its pinned versions: more than one where Python versions need different ones."""
    pins: dict[str, list[str]] = {}
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        if line and not line.lstrip().startswith("#"):
            name, version = re.fullmatch(r"([\w.-]+)==([\w.+!-]+)(?: ; .+)?", line).groups()
            pins.setdefault(canonicalize_name(name), []).append(version)
    return pins


def test_lock_pins_everything_that_is_asked_for() -> None:
    pins = locked()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = list(project["dependencies"])
    for extra in project["optional-dependencies"].values():
        asked += extra
    asked += [
        line
        for line in (ROOT / "requirements.in").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    for requirement in map(Requirement, asked):
        name = canonicalize_name(requirement.name)
        if name != project["name"]:
            assert name in pins, f"{name} is not in requirements.lock: run `make lock`"
            wrong = [v for v in pins[name] if not requirement.specifier.contains(v)]
            assert not wrong, f"{requirement} is locked at {wrong}: run `make lock`"


def test_lock_brings_no_cuda() -> None:
    assert [name for name in locked() if name.startswith(("nvidia", "cuda", "triton"))] == []


def test_environment_yml_has_the_pins_of_the_lock_and_no_others() -> None:
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (from_pip,) = (entry["pip"] for entry in dependencies if isinstance(entry, dict))
    assert "-r requirements.lock" in from_pip
    assert [entry for entry in from_pip if not entry.startswith("-")] == []
    conda = [entry for entry in dependencies if isinstance(entry, str)]
    assert [entry.split("=")[0] for entry in conda] == ["python", "pip"]


@pytest.mark.parametrize(
    "path", [*NOTEBOOKS, *(ROOT / "bitnet_edu").rglob("*.ipynb")], ids=lambda path: path.stem
)
def test_notebook_is_stripped(path: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert "widgets" not in notebook["metadata"]
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [], "run: .venv/bin/nbstripout notebooks/*.ipynb"
            assert cell["execution_count"] is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_first_code_cell_installs_the_package_on_colab(path: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    first = next(cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    assert "".join(first["source"]) == COLAB_CELL
    assert first["metadata"]["tags"] == ["remove-cell"]


def test_table_of_contents_has_every_notebook_and_no_ghost() -> None:
    listed = chapters()
    for name in listed:
        assert any((ROOT / f"{name}{suffix}").is_file() for suffix in (".md", ".ipynb")), name
    assert [name for name in listed if name.startswith("notebooks/")] == [
        f"notebooks/{path.stem}" for path in NOTEBOOKS
    ]


def test_the_introductions_map_is_the_table_of_contents() -> None:
    intro = (ROOT / "book" / "intro.md").read_text(encoding="utf-8")
    intro = re.sub(r"^%.*$", "", intro, flags=re.MULTILINE)
    mapped = re.findall(r"\]\(\.\./(notebooks/\w+)\.ipynb\)", intro)
    assert mapped == [name for name in chapters() if name.startswith("notebooks/")]


def test_no_path_of_one_machine_in_any_file() -> None:
    private = re.compile(r"(?<![\w.:/])/(?:home|root|Users|work|opt|farm|mnt)/[\w.-]+")
    found = []
    for name in tracked_files():
        text = (ROOT / name).read_bytes().decode("utf-8", errors="ignore")
        found += [f"{name}: {match}" for match in private.findall(text)]
    assert not found, found


def test_every_link_to_the_repository_is_the_configured_one() -> None:
    name = URL.removeprefix("https://github.com/")
    for file in ("README.md", "CITATION.cff", "pyproject.toml", "book/setup.md", "book/intro.md"):
        for owner in re.findall(
            r"(?:github\.com|/gh|/github)/([\w-]+/bitnet-from-scratch)\b",
            (ROOT / file).read_text(encoding="utf-8"),
        ):
            assert owner == name, f"{file} names {owner}, _config.yml {name}"


def test_readme_links_and_badges_point_at_files() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r'(?:\]\(|src=")(?!https?:)([^)#"]+)', readme)
    branch = CONFIG["repository"]["branch"]
    targets += re.findall(
        rf"colab\.research\.google\.com/github/[^)]+/blob/{branch}/([^)]+)", readme
    )
    targets += re.findall(r"mybinder\.org/v2/gh/[^)]+labpath=([^)]+)", readme)
    assert targets
    missing = [target for target in targets if not (ROOT / target.replace("%2F", "/")).exists()]
    assert not missing


def test_vendored_anywidget_is_the_installed_one() -> None:
    import anywidget

    installed = Path(anywidget.__file__).parent / "nbextension" / "index.js"
    vendored = ROOT / VENDOR / "anywidget" / "index.js"
    assert vendored.read_bytes() == installed.read_bytes(), "run tools/vendor.sh"
