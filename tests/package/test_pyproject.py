"""pyproject.toml against the code: every import is declared, nothing declared is unused."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.package.source_tree import packages, sources

ROOT = Path(__file__).resolve().parents[2]
IMPORT_NAMES = {
    "huggingface-hub": "huggingface_hub",
    "pillow": "PIL",
    "pyyaml": "yaml",
}
# Declared without an import of ours: used by a library when it is there.
USED_BY_OTHERS = {
    "jinja2": "transformers renders chat templates with it",
    "s3fs": "fsspec opens s3:// with it",
    "gcsfs": "fsspec opens gs:// with it",
}


def _project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def _names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=!~; ]", r)[0].lower() for r in requirements}


def _declared(*, extras: bool) -> set[str]:
    project = _project()
    optional = project["optional-dependencies"]
    wanted = {n for k, v in optional.items() if k != "dev" for n in _names(v)} if extras else set()
    return _names(project["dependencies"]) | wanted


def _roots(lazy_too: bool) -> set[str]:
    own = {"pipeline", "jobs", "scripts", "tests", ""}
    found = {
        i.module.split(".")[0] for s in packages() for i in s.imports() if lazy_too or not i.lazy
    }
    return found - own - set(sys.stdlib_module_names)


def test_every_import_is_declared() -> None:
    known = {IMPORT_NAMES.get(name, name) for name in _declared(extras=True)}
    assert _roots(lazy_too=True) <= known


def test_imports_at_module_level_need_no_extra() -> None:
    known = {IMPORT_NAMES.get(name, name) for name in _declared(extras=False)}
    assert _roots(lazy_too=False) <= known


def test_everything_declared_is_used() -> None:
    used = _roots(lazy_too=True)
    unused = {
        name
        for name in _declared(extras=False)
        if IMPORT_NAMES.get(name, name) not in used and name not in USED_BY_OTHERS
    }
    assert not unused


def test_every_dependency_has_a_lower_bound() -> None:
    assert not [r for r in _project()["dependencies"] if ">=" not in r]


def test_readme_gives_each_dependency_a_reason() -> None:
    text = (ROOT / "README.md").read_text()
    assert not [name for name in _declared(extras=True) if f"`{name}`" not in text]


def test_the_command_leads_to_a_function() -> None:
    module, _, name = _project()["scripts"]["vlm-batch"].partition(":")
    found = [s for s in sources() if s.module == module]
    assert found
    assert re.search(rf"^(def {name}\(|{name}\b)", found[0].text, re.MULTILINE)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_configs_load(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jobs.config import load_config

    for name in ("MODEL", "IMAGES", "OUT", "ROWS", "FOLDER", "DATASET", "SPLIT", "IMAGE_COLUMN"):
        monkeypatch.delenv(name, raising=False)
    config = load_config(str(path), [])
    assert config.output.path.startswith("out/")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_configs_say_how_to_run_them(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# ")
    assert f"vlm-batch run configs/{path.name}" in text
    assert yaml.safe_load(text)["model"]["id"]
