"""What the documentation points at is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vllm_flashmla_backend.flash_mla import providers

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)]+)\)", page.read_text())
    assert not [link for link in links if "://" not in link and not leads_somewhere(page, link)]


def leads_somewhere(page: Path, link: str) -> bool:
    """Whether its file is there and, if it names one, the heading in it."""
    name, _, anchor = link.partition("#")
    path = page.parent / name if name else page
    return path.exists() and (not anchor or anchor in anchors(path))


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to the page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.M)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_settings_name_every_choice_of_kernels():
    settings = (ROOT / "docs" / "settings.md").read_text()
    row = next(line for line in settings.splitlines() if providers.CHOICE_VARIABLE in line and "auto" in line)
    assert {"auto", *providers.CHOICES} <= set(re.findall(r"`(\w+)`", row))


def test_kernels_that_a_profiler_shows_have_the_names_that_the_docs_give():
    named = set(re.findall(r"`(\w+_kernel)`", (ROOT / "docs" / "troubleshooting.md").read_text()))
    sources = "".join(path.read_text() for path in (ROOT / "csrc").rglob("*.cu"))
    defined = set(re.findall(r"__global__[^;{]*?(\w+_kernel)\(", sources))
    assert named == defined
