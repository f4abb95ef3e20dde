"""What a fresh machine needs: the wheel, the pinned set, and `make`."""

import configparser
import os
import re
import shutil
import subprocess
import sys
import warnings
import zipfile
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from docs.architecture import imports, modules

ROOT = Path(__file__).resolve().parents[1]
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
PINS = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
)


def package_files() -> set[str]:
    files = (path for path in (ROOT / "fslora_hf").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(ROOT).as_posix() for path in files}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel, built from a copy: a build leaves folders beside the sources, and takes in what an older one left."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "fslora_hf", source / "fslora_hf", ignore=shutil.ignore_patterns("__pycache__"))
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        out,
        source,
    ]
    subprocess.run(command, check=True)
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel):
    inside = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert inside == package_files()


def test_the_wheels_metadata(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
    metadata = wheel.read(name).decode()
    for line in ("Name: fslora_hf", "Version: 0.1.0", "License-Expression: MIT", "Requires-Python: >=3.11"):
        assert line in metadata.splitlines()
    assert (ROOT / "README.md").read_text().splitlines()[0] in metadata


def requirements() -> list[Requirement]:
    lines = SETUP["options"]["install_requires"].split("\n")
    for extra in SETUP["options.extras_require"].values():
        lines += extra.split("\n")
    return [Requirement(line) for line in lines if line]


def test_what_the_package_imports_is_required():
    """By us, or by what goes with it: what others happen to bring they may do without one day."""
    goes_with = {"markupsafe": "Jinja2", "pyarrow": "datasets", "yaml": "huggingface_hub"}
    imported = {name.split(".")[0] for module in modules() for name in imports(module)} - {"", "__future__"}
    required = {canonicalize_name(requirement.name) for requirement in requirements()}
    homes = packages_distributions()
    for name in sorted(imported - sys.stdlib_module_names):
        distributions = {canonicalize_name(each) for each in homes[name]}
        if name in goes_with:
            brought = {canonicalize_name(Requirement(line).name) for line in distribution(goes_with[name]).requires}
            assert distributions & brought and canonicalize_name(goes_with[name]) in required, name
        else:
            assert distributions & required, f"name {name} in setup.cfg"


def test_every_requirement_has_a_lower_bound_that_the_pinned_version_meets():
    for requirement in requirements():
        assert [spec.operator for spec in requirement.specifier] == [">="], requirement
        assert requirement.specifier.contains(PINS[requirement.name]), requirement


def test_pins_are_complete():
    """Whatever the requirements pull in is pinned too, but for what only a CUDA build of torch asks for."""
    seen, ahead = set(), [requirement.name for requirement in requirements()]
    while ahead:
        name = canonicalize_name(ahead.pop())
        if name in seen:
            continue
        seen.add(name)
        needs = map(Requirement, distribution(name).requires or [])
        ahead += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    pinned = {canonicalize_name(name) for name in PINS}
    installed_by_pip = {name for name in seen if not name.startswith(("nvidia-", "cuda-", "triton"))}
    assert installed_by_pip <= pinned, installed_by_pip - pinned
    assert not [version for version in PINS.values() if "+" in version]


@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning, PendingDeprecationWarning])
def test_our_own_use_of_deprecated_names_is_an_error(category):
    def use(module: str) -> None:
        exec("import warnings; warnings.warn('old', category)", {"__name__": module, "category": category})

    for ours in ("fslora_hf.trainers.sft", "test_anything"):
        with pytest.raises(category):
            use(ours)
    with warnings.catch_warnings(record=True) as caught:
        use("transformers.trainer")
    assert [warning.category for warning in caught] == [category]


def make(*arguments: str) -> subprocess.CompletedProcess:
    # Not a part of the make that may be running this test.
    env = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    return subprocess.run(["make", *arguments], cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("target", ["test", "quickstart"])
def test_make_sets_itself_up_before_it_runs(target):
    commands = make("--dry-run", "--always-make", target).stdout
    steps = ["-m venv", "pip install -c constraints.txt -e '.[test,demo,flower]'"]
    steps += {"test": ["ruff check", "-m pytest"], "quickstart": ["prepare_model.py", "accelerate launch"]}[target]
    places = [commands.index(step) for step in steps]
    assert places == sorted(places)


def test_quickstart_hands_the_users_data_on():
    assert '--data_dir "my rows"' in make("--dry-run", "quickstart", "DATA=my rows").stdout
    assert "--data_dir" not in make("--dry-run", "quickstart").stdout


@pytest.fixture
def old_python(tmp_path) -> Path:
    """A stand-in that runs the version check as Python 3.9 would."""
    script = tmp_path / "python3.9"
    old = "import sys; sys.version_info = (3, 9, 2); sys.version = '3.9.2 (old)'; exec(sys.argv[1])"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{old}" "$2"\n')
    script.chmod(0o755)
    return script


def test_an_old_python_is_refused_before_anything_is_installed(old_python):
    refused = make("--always-make", "lint", f"PYTHON={old_python}")
    assert refused.returncode
    assert "Expected Python 3.11 or newer, found 3.9.2 at" in refused.stderr
    assert "name a newer one, for example make PYTHON=python3.12" in refused.stderr
    refused = make("--always-make", "lint", "PYTHON=no-such-python")
    assert "Expected Python 3.11 or newer, found no 'no-such-python'" in refused.stderr


def make_commands(text: str) -> list[str]:
    return [line.split("#")[0].strip() for line in text.splitlines() if re.match(r"\s*make\b", line)]


def test_ci_runs_the_commands_of_the_readme_in_its_order():
    """In one clone: what one command leaves behind must not trip the next."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = make_commands("\n".join(re.findall(r"```sh\n(.*?)```", readme, flags=re.DOTALL)))
    assert shown == ["make quickstart", "make test", "make federation", "make test-federation"]
    commands = make_commands((ROOT / ".ci" / "run").read_text())
    assert commands == [*shown, 'make ci-real-run DATA="$FSLORA_COMMONSENSE_DIR"']
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


@pytest.mark.parametrize("left", ["outputs", "wandb", "numpy", "measurements"])
def test_lint_is_not_led_astray_by_a_folder_that_a_run_left(left, tmp_path):
    """A folder at the top is no module, even where a file imports one of its name."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "ruff.toml", tmp_path)
    (tmp_path / left).mkdir()
    ruff = Path(sys.executable).with_name("ruff")
    checked = subprocess.run([ruff, "check", "--no-cache", "."], cwd=tmp_path, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_names_of_modules_are_their_own():
    """Folders of scripts and of tests are searched side by side, and where runs leave folders, too."""
    ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()}
    scripts = {path.stem for name in ("benchmarks", "federation") for path in (ROOT / "recipes" / name).glob("*.py")}
    assert not scripts & ({path.stem for path in (ROOT / "tests").rglob("*.py")} | ignored)
