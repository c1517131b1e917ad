"""Laws of the documentation: what it links to and names exists, and MkDocs makes a site of it."""

import contextlib
import io
import os
import pkgutil
import re
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml

from support.environments import environment
from support.runs import ROOT
from support.tiny import byte_tokenizer, tiny_model

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted([*(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.md")])
API_PAGES = sorted((ROOT / "docs" / "api").glob("*.md"))


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def prose(page: Path) -> str:
    """The text of a page without its code blocks."""
    return re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ +(.+?) *$", prose(page), re.MULTILINE):
        text = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        repeats = found[slug] = found.get(slug, -1) + 1
        if repeats:
            found[f"{slug}-{repeats}"] = 0
    return set(found)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    text = re.sub(r"`[^`]*`", "`code`", prose(page))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", link):  # https:, mailto:
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert ROOT in target.parents, f"{link} is outside the repository"
        if anchor:
            assert anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_list_or_table_begins_after_a_blank_line(page: Path) -> None:
    """GitHub also reads one that follows a line of text; MkDocs would make it a part of the paragraph."""
    for before, line in pairwise(prose(page).splitlines()):
        for kind in (r"[-*+] |\d+\. ", r"\|"):
            begins = re.match(kind, line) and not re.match(rf"{kind}|\s|#|$", before)
            assert not begins, f"{before}\n{line}"


def test_every_page_is_in_the_navigation_once() -> None:
    listed = list(navigation())
    assert len(listed) == len(set(listed))
    assert {name_of(page) for page in PAGES} <= set(listed)


def navigation() -> Iterator[str]:
    """The paths in the navigation of mkdocs.yml."""

    class Loader(yaml.SafeLoader):
        """Reads MkDocs' tags (!ENV, !!python/name) as None."""

    for tag in ("!", "tag:yaml.org,2002:python/"):
        Loader.add_multi_constructor(tag, lambda loader, suffix, node: None)
    entries = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)["nav"]
    while entries:
        ((_, target),) = entries.pop(0).items()
        if isinstance(target, list):
            entries[:0] = target
        else:
            yield target


def documented_names(page: Path) -> Iterator[str]:
    """Each module that an API page shows, and the members that it selects."""
    directive = r"^::: (\S+)(?:\n    options:\n      members: \[([^\]]*)\])?$"
    for module, members in re.findall(directive, page.read_text(encoding="utf-8"), re.MULTILINE):
        yield module
        yield from (f"{module}.{member}" for member in re.findall(r"\w+", members))


@pytest.mark.parametrize("page", API_PAGES, ids=name_of)
def test_every_name_in_the_api_reference_can_be_imported_and_has_a_docstring(page: Path) -> None:
    for name in documented_names(page):
        assert pkgutil.resolve_name(name).__doc__, name


def test_the_example_of_the_api_reference_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in (tiny_model(), byte_tokenizer(eos_token="<|endoftext|>")):
        part.save_pretrained(tmp_path / "runs" / "quickstart")
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "api" / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(example, {})
    assert output.getvalue().startswith("Return the")


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_loads_nothing_from_other_servers(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    python = environment(tmp_path_factory, "docs", ["-r", str(ROOT / "requirements-docs.txt")])
    built = subprocess.run(
        [python, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )
    assert built.returncode == 0, built.stderr

    pages = {path: path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.html")}
    for path, html in pages.items():
        assert not re.findall(r"<(?:script|img|iframe|source)[^>]* src=\"?https?:[^>]*>", html), path
        assert not re.findall(r"<link[^>]* rel=\"?(?:stylesheet|preconnect|icon)[^>]*https?:[^>]*>", html), path
    diagrams = [html for html in pages.values() if '<pre class="mermaid">' in html]
    assert diagrams
    assert all("mermaid.min.js" in html for html in diagrams)
    for page in API_PAGES:
        html = pages[tmp_path / "docs" / "api" / page.stem.replace("README", ".") / "index.html"]
        for name in documented_names(page):
            assert f'id="{name}"' in html, name
