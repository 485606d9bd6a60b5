"""Pages made from files outside `docs/`: README, CONTRIBUTING, CHANGELOG, the examples, and the notebook."""

import ast
import posixpath
import re
import tomllib
from pathlib import Path
from typing import Any

import nbconvert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
COPIED = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
NOTEBOOK = "docs/quickstart.ipynb"
SCRIPTS = [script for script in sorted((ROOT / "examples").glob("*.py")) if "__main__" in script.read_text()]
LINK = re.compile(r"(\]\()([^)#\s:]+)((?:#[^)\s]*)?\))")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add a page for each example to the navigation."""
    for section in config.nav or []:
        if "Examples" in section:
            section["Examples"].extend({script.stem: f"examples/{script.stem}.md"} for script in SCRIPTS)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    made: dict[str, Any] = {page: (ROOT / source).read_text() for source, page in COPIED.items()}
    made |= {f"examples/{script.stem}.md": write_example(script) for script in SCRIPTS}
    made["examples/index.md"] = write_index(SCRIPTS)
    body, resources = nbconvert.MarkdownExporter().from_filename(str(ROOT / NOTEBOOK))
    made |= {"quickstart.md": body, **resources["outputs"]}
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Rewrite links between files of the repository as links between pages, or to the repository."""
    here = page.file.src_uri
    source = {copy: source for source, copy in COPIED.items()}.get(here, f"docs/{here}")

    def rewrite(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
        site = find_page(target)
        address = address_of(target) if site is None else posixpath.relpath(site, posixpath.dirname(here) or ".")
        return f"{match[1]}{address}{match[3]}"

    return LINK.sub(rewrite, markdown)


def find_page(path: str) -> str | None:
    """Return the file of the site that shows a file of the repository; None if there is none."""
    pages = COPIED | {NOTEBOOK: "quickstart.md"} | {f"examples/{s.name}": f"examples/{s.stem}.md" for s in SCRIPTS}
    if path in pages:
        return pages[path]
    return path.removeprefix("docs/") if path.startswith("docs/") and not path.endswith(".json") else None


def address_of(path: str) -> str:
    """Return the address of a file of the repository that is not on the site."""
    if not (ROOT / path).exists():
        raise FileNotFoundError(f"A page links to {path!r}, which is not in the repository.")
    repository = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    return f"{repository}/blob/main/{path}"


def read_docstring(script: Path) -> tuple[str, str]:
    """Return the first line of a script's docstring, and the rest."""
    first, _, rest = (ast.get_docstring(ast.parse(script.read_text())) or script.stem).partition("\n")
    return first.rstrip("."), rest.strip()


def write_example(script: Path) -> str:
    """Return the page of a script: its docstring, then the script."""
    title, text = read_docstring(script)
    path = script.relative_to(ROOT)
    code = script.read_text().split('"""', 2)[2].strip()
    return f"# {title}\n\n{text}\n\nThe script is [`{path}`](../../{path}):\n\n```python\n{code}\n```\n"


def write_index(scripts: list[Path]) -> str:
    """Return the list of examples."""
    lines = [f"* [`{script.stem}.py`]({script.stem}.md): {read_docstring(script)[0]}." for script in scripts]
    text = "Complete scripts, in the folder `examples/` of the repository. Each runs as it is on a CPU:"
    return "\n".join(["# Examples", "", f"{text} `python examples/NAME.py`.", "", *lines]) + "\n"
