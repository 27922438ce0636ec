"""What README and docs point at is there, and what they show holds."""

import re
from pathlib import Path

import pytest
from conftest import REPOSITORY

from vapo_async.config.load import group_choices
from vapo_async.verifier import is_equivalent

PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
README = (REPOSITORY / "README.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links {target}"


def test_the_tree_in_the_readme_is_the_tree() -> None:
    tree = README.split("## Where things are")[1].split("```")[1]
    indented = [line.strip() for line in tree.splitlines() if line.startswith("  ")]
    names = {name.strip() for line in indented for name in re.split(r"  +", line)[0].split(",")}
    package = REPOSITORY / "vapo_async"
    for name in names:
        assert list(package.glob(name.rstrip("/"))), f"README names {name}"
    for path in package.iterdir():
        if path.name.startswith("__"):
            continue
        assert any(path.match(name.rstrip("/")) for name in names), f"README does not name {path.name}"


def test_the_choices_in_the_readme_are_the_choices() -> None:
    for group, choices in group_choices().items():
        row = next(line for line in README.splitlines() if line.startswith(f"| `{group}`"))
        named = set(re.findall(r"`([\w.]+)`", row.split("|")[2]))
        assert named == set(choices), group


def test_the_examples_in_the_readme_hold() -> None:
    assert is_equivalent(r"\frac12", "0.5")
