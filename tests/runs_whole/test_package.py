"""What is released: version, licence, bounds of the requirements, and wheel and sdist that work without a checkout."""

import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml
from helpers.places import ROOT
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from kava_trainer import __version__
from kava_trainer.config.recipes import accelerate_config, recipe_names

VERSION = Version(__version__)
BUILD_TOOLS = {"build", "mypy", "pytest-xdist", "ruff", "setuptools"}
"""These meet no model, so one version of them will do."""


def setup_cfg() -> ConfigParser:
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    return config


def pins(name: str) -> dict[str, Version]:
    """The versions that a file of constraints holds for this Python."""
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    found = {}
    for requirement in map(Requirement, filter(None, lines)):
        if requirement.marker is None or requirement.marker.evaluate(default_environment()):
            (pin,) = requirement.specifier
            assert pin.operator == "==", requirement
            found[canonicalize_name(requirement.name)] = Version(pin.version)
    return found


def requirements(*extras: str) -> dict[str, Version]:
    """The lower bound of each package that KAVA requires, or that its extras do."""
    config = setup_cfg()
    named = config["options.extras_require"]
    texts = [named[extra] for extra in extras] if extras else [config["options"]["install_requires"]]
    found = {}
    for requirement in map(Requirement, filter(None, "\n".join(texts).splitlines())):
        (bound,) = (part.version for part in requirement.specifier if part.operator == ">=")
        name = canonicalize_name(requirement.name)
        assert found.setdefault(name, Version(bound)) == Version(bound), f"{name} has two lower bounds"
    return found


def test_the_version_is_that_of_the_changelog():
    assert str(VERSION) == __version__
    assert len(VERSION.release) == 3
    first, *others = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    if VERSION.is_devrelease:
        assert first == "Unreleased"
        released = others
    else:
        assert re.fullmatch(rf"{re.escape(__version__)} \(\d{{4}}-\d\d-\d\d\)", first)
        released = others
    assert all(Version(heading.split()[0]) < VERSION for heading in released)


def test_each_lower_bound_is_the_oldest_version_that_is_tested():
    oldest, newest = pins("constraints-oldest.txt"), pins("constraints.txt")
    extras = setup_cfg().options("options.extras_require")
    for name, bound in (requirements() | requirements(*extras)).items():
        assert name in oldest, f"constraints-oldest.txt does not name {name}"
        if name not in BUILD_TOOLS:
            assert oldest[name] == bound, f"{name}>={bound}, but {oldest[name]} is tested"
        assert bound <= oldest[name] <= newest.get(name, oldest[name])
    assert not (requirements() | requirements("test")).keys() - newest.keys()


def test_the_pins_of_other_files_are_those_of_the_constraints():
    newest = pins("constraints.txt")
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    needed = [name for repo in config["repos"] for hook in repo["hooks"] for name in hook["additional_dependencies"]]
    ruffs = {name for name in needed if name.startswith("ruff")}
    assert ruffs == {f"ruff=={newest['ruff']}"}
    documents = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
    shown = [re.findall(r"pip install torch==([\d.]+)", path.read_text(encoding="utf-8")) for path in documents]
    assert {pin for pins_shown in shown for pin in pins_shown} == {str(newest["torch"])}


def project_files() -> set[str]:
    """The files of the project: what git knows or would take, or, without git, what the sdist lists."""
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    else:
        names = (ROOT / "kava_trainer.egg-info" / "SOURCES.txt").read_text().splitlines()
        names = [name for name in names if not name.startswith("kava_trainer.egg-info/")]
    return {name for name in names if name and (ROOT / name).is_file()}


JUNK = ("kava_trainer/__pycache__/losses.pyc", "checkpoints/mine/model.safetensors", "tests/__pycache__/x.pyc")


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> dict[str, Path]:
    """Wheel and sdist, as `python -m build` makes them of a copy with junk in it; the wheel is made of the sdist."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in (*project_files(), *JUNK):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(b"" if name in JUNK else (ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    built = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    assert "is absent from the `packages` configuration" not in built.stdout + built.stderr
    wheel, sdist = sorted(out.iterdir(), key=lambda path: path.suffix, reverse=True)
    return {"wheel": wheel, "sdist": sdist}


def test_the_sdist_holds_the_whole_project_and_no_junk(distributions):
    with tarfile.open(distributions["sdist"]) as archive:
        held = {member.name.split("/", 1)[1] for member in archive.getmembers() if member.isfile()}
    made = {name for name in held if name == "PKG-INFO" or name.startswith("kava_trainer.egg-info/")}
    assert held - made == project_files()


def test_the_wheel_holds_the_package_with_its_models_and_recipes(distributions):
    with zipfile.ZipFile(distributions["wheel"]) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA"))
        (licence,) = (archive.read(name) for name in archive.namelist() if name.endswith("/licenses/LICENSE"))
    files = project_files()
    package = {name for name in files if name.startswith("kava_trainer/")}
    recipes = {f"kava_trainer/{name}" for name in files if name.startswith("training_args/")}
    assert held == package | recipes | {"run_kava.py"}
    assert f"\nVersion: {__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert licence == (ROOT / "LICENSE").read_bytes()


@pytest.mark.slow
def test_the_wheel_runs_the_quickstart_without_a_checkout(distributions, tmp_path):
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*install, str(distributions["wheel"])], check=True, capture_output=True)
    environment = {**os.environ, "PYTHONPATH": str(site)}

    def python(*words: str) -> str:
        done = subprocess.run([sys.executable, *words], cwd=work, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    look = (
        "import kava_trainer, run_kava, kava_trainer.config.recipes as r; print(kava_trainer.__file__, "
        "run_kava.__file__, r.accelerate_config('ddp.yaml'), *r.recipe_names())"
    )
    package, script, config, names = python("-c", look).split(maxsplit=3)
    assert Path(package).is_relative_to(site)
    assert Path(script).is_relative_to(site)
    assert Path(config).is_relative_to(site)
    assert Path(config).read_bytes() == (ROOT / accelerate_config("ddp.yaml")).read_bytes()
    assert names.split() == recipe_names()
    fewer = (
        "--max_steps 2 --max_train_samples 64 --max_eval_samples 4 --generation_max_new_tokens 8 --run_control false"
    )
    shown = python("-m", "kava_trainer", "train", "quickstart", *fewer.split(), "--use_cpu", "true")
    assert "Student after" in shown
    summary = json.loads((work / "checkpoints" / "quickstart" / "run_summary.json").read_text())
    assert (summary["status"], summary["global_step"]) == ("completed", 2)
    assert summary["environment"]["kava_trainer"] == __version__
    assert (work / "checkpoints" / "quickstart" / "final_student" / "model.safetensors").is_file()
