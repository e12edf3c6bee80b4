"""What the documents point to exists: links, headings, files, and functions in the walk."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from programs import run_here

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    path for place in (".", "docs", "benchmarks") for path in sorted((ROOT / place).glob("*.md"))
]

FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+\s+(.+?)\s*$", re.MULTILINE)
FOLDERS = "csrc|python|dualpipe_ext|tests|benchmarks|examples|docs|.ci".replace(".", r"\.")
# A path from the root, in any text: a file with its ending, or a folder with its slash.
REPOSITORY_PATH = re.compile(
    rf"(?<![\w/.])((?:{FOLDERS})/(?:[\w.*-]+/)*(?:[\w*-]+\.(?:\w+)\b)?)(?![\w*])"
)
# A path from csrc/, as in an #include.
CORE_PATH = re.compile(
    r"`((?:common|schedule|device|memory|comm|engine|torch)/[\w/]+\.(?:h|cpp))\b"
)
# file:function, as the walk names its hops.
FUNCTION = re.compile(r"`((?:csrc|python|dualpipe_ext)/[\w/.]+):([\w:.~]+)`")
SCRIPT = re.compile(r"^```python\n(.*?^if __name__ .*?)^```$", re.MULTILINE | re.DOTALL)
# In comments of sources: (docs/architecture.md, "Actions").
REFERENCE = re.compile(r'(docs/\w+\.md),[\s/#]+"([^"]+)"')


def anchors(path: Path) -> set[str]:
    return {
        re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-")
        for heading in HEADING.findall(FENCE.sub("", path.read_text()))
    }


def ids(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_there_are_documents() -> None:
    names = {ids(path) for path in DOCUMENTS}
    assert {"README.md", "docs/architecture.md", "docs/walk.md", "docs/performance.md"} <= names


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids)
def test_links_lead_somewhere(document: Path) -> None:
    for link in LINK.findall(FENCE.sub("", document.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        path = (document.parent / target) if target else document
        assert path.exists(), link
        assert not anchor or anchor in anchors(path), link


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids)
def test_paths_exist(document: Path) -> None:
    text = document.read_text()
    for path in REPOSITORY_PATH.findall(text):
        assert any(ROOT.glob(path.rstrip("/"))), path
    for path in CORE_PATH.findall(text):
        assert (ROOT / "csrc" / path).is_file(), path


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids)
def test_functions_exist(document: Path) -> None:
    for path, function in FUNCTION.findall(document.read_text()):
        name = re.split(r"::|\.", function)[-1]
        assert re.search(rf"\b{re.escape(name)}\b", (ROOT / path).read_text()), f"{path}:{function}"


def test_the_walk_names_functions() -> None:
    assert len(FUNCTION.findall((ROOT / "docs" / "walk.md").read_text())) >= 5


def test_sources_refer_to_headings_that_exist() -> None:
    sources = [
        path
        for folder in ("csrc", "python", "dualpipe_ext")
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in (".h", ".cpp", ".py")
    ]
    references = [found for path in sources for found in REFERENCE.findall(path.read_text())]
    assert references
    for document, heading in references:
        headings = HEADING.findall((ROOT / document).read_text())
        assert heading in headings, f'{document}, "{heading}"'


def test_the_training_in_the_readme_learns(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    scripts = SCRIPT.findall((ROOT / "README.md").read_text())
    (script,) = (text for text in scripts if "TrainingWrapper" in text)
    path = tmp_path / "train.py"
    path.write_text(script)
    run_here(path)
    output = capfd.readouterr().out
    curve = [float(value) for value in re.findall(r"loss ([\d.]+)", output)]
    assert len(curve) == 5 and curve[-1] < 0.7 * curve[0], output


def test_the_loop_with_main_grad_learns(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    scripts = SCRIPT.findall((ROOT / "docs" / "your_model.md").read_text())
    (script,) = (text for text in scripts if "main_grad" in text)
    path = tmp_path / "train.py"
    path.write_text(script)
    run_here(path)
    output = capfd.readouterr().out
    curve = [float(value) for value in re.findall(r"loss ([\d.]+)", output)]
    assert len(curve) == 5 and curve[-1] < 0.5 * curve[0], output


def test_the_readme_shows_the_example_as_it_is() -> None:
    scripts = SCRIPT.findall((ROOT / "README.md").read_text())
    assert (ROOT / "examples" / "own_model.py").read_text() in scripts
