"""Hooks of MkDocs for the documentation site; mkdocs.yml names this file.

The site has the layout of the repository, so every relative link works on GitHub and on the site. No page loads
anything from another server.
"""

import base64
import hashlib
import io
import logging
import tarfile
import urllib.request
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url

ROOT = Path(__file__).parents[2]
OUTSIDE_DOCS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "examples/*.md", "examples/*.py")

MERMAID = "https://registry.npmjs.org/mermaid/-/mermaid-11.17.2.tgz"
MERMAID_SHA512 = "V6K3C8EBdEsPFZXSKMJe6ppQOENxuHARr9GvHX4hh47lAbhMRD9qf4oEK7LoaRQxULMa80/qt5gHO73aCleBBg=="
MERMAID_SCRIPT = "docs/site/mermaid.min.js"

log = logging.getLogger(f"mkdocs.plugins.{__name__}")


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Give each file its path in the repository, and add the files outside docs/ that pages link to."""
    paths = [path.relative_to(ROOT).as_posix() for pattern in OUTSIDE_DOCS for path in sorted(ROOT.glob(pattern))]
    for file in list(files):
        if file.src_dir == config.docs_dir:
            files.remove(file)
            paths.append(f"docs/{file.src_uri}")
    for path in paths:
        files.append(File(path, str(ROOT), config.site_dir, config.use_directory_urls))
    if script := mermaid_script():
        files.append(File.generated(config, MERMAID_SCRIPT, content=script))


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Load our copy of Mermaid on pages with a diagram; otherwise the theme would load it from unpkg.com."""
    if '<pre class="mermaid">' not in output:
        return output
    script = f'<script src="{get_relative_url(MERMAID_SCRIPT, page.url)}"></script>'
    return output.replace("</head>", f"{script}</head>", 1)


def mermaid_script() -> bytes | None:
    """The script of Mermaid, from npm's registry the first time and from .cache/ afterwards."""
    cached = ROOT / ".cache" / Path(MERMAID).with_suffix(".min.js").name
    if not cached.exists():
        try:
            with urllib.request.urlopen(MERMAID, timeout=60) as response:
                archive = response.read()
        except OSError as error:
            log.warning(f"cannot download {MERMAID}: {error}")
            return None
        if base64.b64encode(hashlib.sha512(archive).digest()).decode() != MERMAID_SHA512:
            raise ValueError(f"{MERMAID} does not have the expected SHA-512")
        with tarfile.open(fileobj=io.BytesIO(archive)) as package:
            script = package.extractfile("package/dist/mermaid.min.js")
            assert script is not None
            cached.parent.mkdir(exist_ok=True)
            cached.write_bytes(script.read())
    return cached.read_bytes()
