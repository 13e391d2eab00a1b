"""What a stranger relies on: pins, notebooks, the table of contents, links, a light import."""

import json
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_floors import FLOORS

ROOT = Path(__file__).parents[1]
VENDOR = "book/_static/vendor/"  # other projects' files, unchanged
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text())

URL, BRANCH = CONFIG["repository"]["url"], CONFIG["repository"]["branch"]
# An archive, because git may be missing; Colab has its own torch, which satisfies the package.
COLAB_CELL = f"""import importlib.util
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a BLAS thread that waits takes a core from others
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
def test_first_code_cell_tames_blas_and_installs_the_package_on_colab(path: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    first = next(cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    assert "".join(first["source"]) == COLAB_CELL
    assert first["metadata"]["tags"] == ["remove-cell"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_states_no_run_time_by_hand(path: Path) -> None:
    first = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
    (running,) = re.findall(r"\*\*Running\*\* (.*)", first)
    assert re.fullmatch(r"\[measured\]\((99_parity_ledger\.ipynb)?#seconds-and-memory\)", running)


HEDGE = re.compile(r"\b(can|may|if|where|could|should|would|might|whether)\b|\?", re.IGNORECASE)
COMPARES = re.compile(r"\b(faster|slower|slowest|fastest(?! (read|token))|times as fast)\b", re.I)


def bare_comparisons(text: str) -> list[str]:
    """Sentences that say which of two things is faster, as if every machine had said so."""
    sentences = re.split(r"(?<=[.!?:])\s+|\n", text)
    return [s for s in sentences if COMPARES.search(s) and not HEDGE.search(s)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_text_beside_a_clock_states_no_winner(path: Path) -> None:
    """What is measured is put into words by the run itself, from its own numbers."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    if "perf_counter" in code:
        prose = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
        assert [s for text in prose for s in bare_comparisons(text)] == []


def test_bare_comparisons_are_found() -> None:
    text = "Packing pays. Rung 5 is four times as fast. It may be slower. Is it faster?"
    assert bare_comparisons(text) == ["Rung 5 is four times as fast."]


def test_what_chooses_a_large_model_asks_for_the_memory_that_is_there() -> None:
    for path in NOTEBOOKS:
        text = path.read_text(encoding="utf-8")
        assert "psutil" not in text, f"{path.stem}: bitnet_edu.system.memory() knows containers"
        if "random_weights(shape)" in text or "is_cached(MODEL)" in text:
            assert "memory().available > " in text or "memory().available / 1e9" in text, path.stem


def test_time_limits_only_end_hangs() -> None:
    assert CONFIG["execute"]["timeout"] >= 600
    assert (
        'timeout=CONFIG["execute"]["timeout"]' in (ROOT / "tools" / "run_notebooks.py").read_text()
    )
    assert not re.search(r"timeout[= ]\d+", (ROOT / "Makefile").read_text())


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


CHAPTERS = {int(path.stem[:2]): path.stem for path in NOTEBOOKS if not path.stem.startswith("99")}
MENTION = re.compile(r"\bchapters?\s((?:\[?\d+(?:\]\([^)]*\))?(?:, | and | to )?)+)", re.IGNORECASE)


def prose_files() -> list[Path]:
    """Everything that may name a chapter by its number."""
    patterns = (
        "notebooks/*.ipynb",
        "book/*.md",
        "*.md",
        "bitnet_edu/**/*.py",
        "bitnet_edu/**/*.js",
    )
    return [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]


def chapters_to_come() -> set[int]:
    intro = (ROOT / "book" / "intro.md").read_text(encoding="utf-8")
    return {int(n) for n in re.findall(r"^- (\d+)\. [^*\n]+ \*\(to come\)\*", intro, re.MULTILINE)}


def wrong_chapters(text: str) -> list[str]:
    """What a text says of chapters that is not so: numbers of none, links to others or to none."""
    known = CHAPTERS.keys() | chapters_to_come()
    wrong = []
    for mention in MENTION.finditer(text):
        numbers = re.findall(r"(?<![\w/(])\d+(?!\w)", mention[1])
        wrong += [mention[0] for n in numbers if int(n) not in known]
    for link in re.finditer(r"\[([^][]*)\]\((?:\.\./notebooks/)?(\d\d)(_\w+)\.ipynb\)", text):
        number = re.search(r"\d+", link[1])
        exists = (ROOT / "notebooks" / f"{link[2]}{link[3]}.ipynb").exists()
        if not exists or (number and int(number[0]) != int(link[2])):
            wrong.append(link[0])
    return wrong


def test_chapters_are_numbered_through() -> None:
    assert not CHAPTERS.keys() & chapters_to_come()
    assert sorted(CHAPTERS.keys() | chapters_to_come()) == list(range(1, 18))
    assert "numbered: " not in (ROOT / "_toc.yml").read_text()  # sphinx's own numbers would differ


@pytest.mark.parametrize("number", CHAPTERS)
def test_title_bears_the_number_of_the_file(number: int) -> None:
    notebook = json.loads((ROOT / "notebooks" / f"{CHAPTERS[number]}.ipynb").read_text("utf-8"))
    assert "".join(notebook["cells"][0]["source"]).startswith(f"# {number}. ")


@pytest.mark.parametrize("path", prose_files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_chapter_that_is_named_exists(path: Path) -> None:
    assert wrong_chapters(path.read_text(encoding="utf-8")) == []


def test_wrong_chapters_are_found() -> None:
    right = "[Chapter 9](09_norms_and_squared_relu.ipynb), Chapters [2](02_absmean.ipynb) and 12"
    assert wrong_chapters(right) == []
    for wrong in (
        "chapter 18",
        "Chapters 2 to 5, 6 and 20",
        "[Chapter 8](09_norms_and_squared_relu.ipynb)",
        "[9. Norms](../notebooks/08_norms_and_squared_relu.ipynb)",
        "Chapters [2](03_absmax.ipynb) and 4",
    ):
        assert wrong_chapters(wrong), wrong


def test_the_ledger_and_the_architecture_figure_name_chapters() -> None:
    named = {}
    for path in [*NOTEBOOKS, *(ROOT / "bitnet_edu").rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        for name in re.findall(r'\\?"(\d\d_[a-z]\w+)\\?"', text):
            named[name] = path.stem
            if path in NOTEBOOKS:
                assert name == path.stem, f"{path.stem} writes the ledger of {name}"
    assert set(named) <= set(CHAPTERS.values())
    assert len(set(named)) >= 10


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


def test_readme_shows_the_floors() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| (\d) \| (`.*`) \| [^|]+ \|$", readme, re.MULTILINE)
    shown = [tuple(re.findall(r"`(\w+)`", rooms)) for _, rooms in table]
    assert [int(floor) for floor, _ in table] == list(range(len(FLOORS)))
    assert [set(rooms) for rooms in shown] == [set(rooms) for rooms in FLOORS]
    assert "README.md#where-things-are" in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_ci_runs_the_readmes_test_command() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^(make \w+)", readme.split("## Two commands")[1], re.MULTILINE)
    assert commands[:2] == ["make book", "make test"]
    assert re.search(r"^make test\b", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)


WORKFLOWS = {
    path.name: yaml.safe_load(path.read_text()) for path in (ROOT / ".github/workflows").glob("*")
}
JOBS = WORKFLOWS["ci.yml"]["jobs"]


def test_workflows_only_call_what_the_repository_has() -> None:
    commands = [entry["command"] for entry in JOBS["test"]["strategy"]["matrix"]["include"]]
    steps = [
        step for w in WORKFLOWS.values() for job in w["jobs"].values() for step in job["steps"]
    ]
    runs = [step["run"] for step in steps if "run" in step]
    assert runs == ["${{ matrix.command }}"]
    for command in commands:
        script = ROOT / command.split()[0]
        assert script.is_file(), command
        assert os.access(script, os.X_OK), command


@pytest.mark.parametrize("name", [".ci/run", ".ci/package", "tools/arm.sh", "tools/vendor.sh"])
def test_shell_scripts_can_be_read(name: str) -> None:
    assert os.access(ROOT / name, os.X_OK)
    read = subprocess.run(["bash", "-n", name], cwd=ROOT, capture_output=True, text=True)
    assert (read.returncode, read.stderr) == (0, "")


def test_every_system_is_tested() -> None:
    entries = JOBS["test"]["strategy"]["matrix"]["include"]
    tried = {(entry["system"], entry["python"]) for entry in entries}
    assert tried >= {("ubuntu-latest", "3.11"), ("ubuntu-latest", "3.13")}
    systems = {system.split("-")[0] for system, _ in tried}
    assert systems == {"ubuntu", "macos", "windows"}
    assert any(system.endswith("-arm") for system, _ in tried)
    assert any(entry["command"] == ".ci/package lowest" for entry in entries)


def test_pages_are_published_only_after_every_test() -> None:
    deploying = {
        (file, name)
        for file, workflow in WORKFLOWS.items()
        for name, job in workflow["jobs"].items()
        if any("deploy-pages" in step.get("uses", "") for step in job["steps"])
    }
    assert deploying == {("ci.yml", "publish")}
    assert JOBS["publish"]["needs"] == "test"
    assert "refs/heads/main" in JOBS["publish"]["if"]
    assert "continue-on-error" not in str(JOBS)
    assert WORKFLOWS["ci.yml"]["permissions"] == {"contents": "read"}


def test_vendored_anywidget_is_the_installed_one() -> None:
    import anywidget

    installed = Path(anywidget.__file__).parent / "nbextension" / "index.js"
    vendored = ROOT / VENDOR / "anywidget" / "index.js"
    assert vendored.read_bytes() == installed.read_bytes(), "run tools/vendor.sh"
