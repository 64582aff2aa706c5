"""The docs are run: every python block, every command of ours in the bash blocks, every link.

Python blocks of a page share one namespace, in a scratch folder that holds small stand-ins for what the quickstart
leaves (`runs/quickstart/encoder`, `dual`, `language_model`, `align`, `instruct`), an image `image.png` and the
Parquet files of the scenes (`runs/quickstart/data`). What is left out says so: a block after the line
`<!-- not run: reason -->` is only compiled. A block that begins with `# file: name.py` is written to that file, which
the page's other blocks and commands can import.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from dry import dry_parse

from mllm_vision import cli

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("README*.md"), *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"(?P<before>[^\n]*\n\s*)?^(?P<indent>[ ]*)```(?P<kind>\w+)\n(?P<body>.*?)^[ ]*```", re.M | re.S)
NOT_RUN = re.compile(r"<!--\s*not run:\s*(\S.*?)\s*-->")
FILE = re.compile(r"# file: (\w+\.py)\n")


def blocks(page: Path, kinds: tuple[str, ...]) -> list[tuple[int, str, bool]]:
    """(line, code, run) of the fenced blocks of these kinds."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in BLOCK.finditer(text):
        if match["kind"] not in kinds:
            continue
        indent = len(match["indent"])
        body = "\n".join(line[indent:] for line in match["body"].split("\n"))
        line = text.count("\n", 0, match.start("body")) + 1
        found.append((line, body, NOT_RUN.search(match["before"] or "") is None))
    return found


def write_files(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those blocks of a page that are files, where its other blocks and commands can import them."""
    for _, code, _ in blocks(page, ("python", "py")):
        if match := FILE.match(code):
            (folder / match[1]).write_text(code, encoding="utf-8")
            monkeypatch.syspath_prepend(folder)


def label(page: Path) -> str:
    return str(page.relative_to(ROOT))


# ---- what the examples find in their folder ------------------------------------------------------------------


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the quickstart leaves it, with models too small to be good; made once, of real parts."""
    import tiny

    from mllm_vision.encoder import VisionEncoder
    from mllm_vision.encoder.dual import DualEncoder
    from mllm_vision.vlm import build_vlm
    from mllm_vision.vlm.export import save_vlm

    folder = tmp_path_factory.mktemp("docs")
    runs = folder / "runs" / "quickstart"
    tiny.random_image(0, 64).save(folder / "image.png")
    for name in ("train", "validation", "test", "single_validation", "single_test", "single_unseen", "unseen_test"):
        tiny.write_pairs_parquet(runs / "data" / f"{name}.parquet", n=16, captions_each=2)
    tiny.write_conversations_jsonl(folder / "conversations.jsonl", n=4)
    (folder / "corpus.txt").write_text("\n".join(tiny.tiny_sentences(200)), encoding="utf-8")
    (runs / "data" / "text.txt").write_text("\n".join(tiny.tiny_sentences(200)), encoding="utf-8")

    encoder = VisionEncoder.from_backbone(tiny.tiny_clip_vision(), tiny.tiny_image_processor("clip"))
    encoder.save_pretrained(runs / "encoder")
    tokenizer = tiny.tiny_tokenizer(runs / "language_model")
    tiny.tiny_llama(len(tokenizer)).save_pretrained(runs / "language_model")
    clip = tiny.tiny_clip(text={"vocab_size": len(tokenizer)})
    clip.save_pretrained(runs / "dual")
    tokenizer.save_pretrained(runs / "dual")
    tiny.tiny_image_processor("clip").save_pretrained(runs / "dual")
    DualEncoder.from_pretrained(runs / "dual")
    for name in ("align", "instruct"):
        model, processor = build_vlm(VisionEncoder.from_pretrained(runs / "encoder"), str(runs / "language_model"))
        save_vlm(model, processor, runs / name)
    return folder


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_python_blocks_run(page: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    found = blocks(page, ("python", "py"))
    if not found:
        return
    for line, code, _ in found:
        # dont_inherit: a reader's script has not this file's `from __future__ import annotations`
        compile(code, f"{page.name}:{line}", "exec", dont_inherit=True)
    if any(run for _, _, run in found):
        folder = request.getfixturevalue("quickstart")
        monkeypatch.chdir(folder)
        write_files(page, folder, monkeypatch)
    namespace: dict[str, Any] = {"__name__": "__docs__"}
    for line, code, run in found:
        if run and not FILE.match(code):
            # padded, so that a traceback names the line of the page
            exec(compile("\n" * line + code, str(page), "exec", dont_inherit=True), namespace)


# ---- commands ------------------------------------------------------------------------------------------------


def commands(block: str) -> list[list[str]]:
    """The words of every command of a bash block; prompts, comments and continued lines are understood."""
    joined = re.sub(r"\\\n\s*", " ", block)
    found = []
    for line in joined.split("\n"):
        line = line.strip().removeprefix("$ ")
        if not line or line.startswith("#"):
            continue
        words = shlex.split(line, comments=True)
        command: list[str] = []
        for word in [*words, ";"]:
            if word in ("&&", "||", ";", "|", "&"):
                found.append(command)
                command = []
            else:
                command.append(word)
    return [command for command in found if command]


def check_command(words: list[str]) -> None:
    """A recipe, a script or a module of ours must take its flags; a make target must exist."""
    words = words[: next((i for i, word in enumerate(words) if re.match(r"^\d?>", word)), len(words))]
    if words[0] == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
        unknown = [word for word in words[1:] if "=" not in word and not word.startswith("-") and word not in targets]
        assert not unknown, f"no such make target: {unknown}"
        return
    if words[0] == "bash":
        assert (ROOT / words[1]).is_file(), f"no such script: {words[1]}"
        return
    while "=" in words[0] and len(words) > 1:  # variables before the command
        words = words[1:]
    if words[0] == "mllm-vision" or words[1:3] == ["-m", "mllm_vision"]:
        check_verb(words[1:] if words[0] == "mllm-vision" else words[3:])
        return
    for position, word in enumerate(words):
        if re.match(r"^(\./)?(recipes|scripts)/[\w/]+\.py$", word):
            target = word.removeprefix("./")
            assert (ROOT / target).is_file(), f"no such file: {target}"
        elif word.startswith("mllm_vision.") and position and words[position - 1] == "-m":
            target = word
        else:
            continue
        given = words[position + 1 :]
        if target != "scripts/env.py" and "--help" not in given:
            dry_parse(target, given)
        return


def check_verb(words: list[str]) -> None:
    """A verb of the command line takes its flags; those of torchrun and the configs of the package are understood."""
    if not words or words[0].startswith("-"):
        return
    name = words[0].replace("_", "-")
    assert name in cli.VERBS, f"no such verb: {name}"
    _, given = cli.split_launcher(name, words[1:])
    target = cli.VERBS[name].file
    if target.endswith(".py") and name != "env" and "--help" not in given:
        dry_parse(target, given)


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_commands_parse(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    write_files(page, tmp_path, monkeypatch)
    for line, block, _ in blocks(page, ("bash", "sh", "shell", "console")):
        for words in commands(block):
            try:
                check_command(words)
            except (ValueError, OSError, AssertionError) as error:
                pytest.fail(f"{label(page)}:{line}: {shlex.join(words)}\n{error}")


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    broken = []
    for target in targets:
        path = target.partition("#")[0]
        if path and not re.match(r"^[a-z]+:", path) and not (page.parent / path).exists():
            broken.append(target)
    assert not broken, f"{label(page)} links to {broken}"


def test_the_checks_can_fail() -> None:
    """Each of the checks above refuses what is wrong."""
    block = "# comment\n$ OMP_NUM_THREADS=1 torchrun recipes/language_model.py \\\n  --text_files x --bad 1"
    (words,) = commands(block)
    with pytest.raises(ValueError, match="unknown flag '--bad'"):
        check_command(words)
    with pytest.raises(AssertionError, match="no such file"):
        check_command(["python", "recipes/nowhere.py"])
    with pytest.raises(AssertionError, match="no such make target"):
        check_command(["make", "quickstrat"])
    with pytest.raises(AssertionError, match="no such verb"):
        check_command(["mllm-vision", "nothing"])
    with pytest.raises(ValueError, match="unknown flag '--bad'"):
        check_command(["python", "-m", "mllm_vision", "language-model", "--text_files", "x", "--bad", "1"])
    check_command(shlex.split("mllm-vision language_model --nproc_per_node 2 --text_files x --output_dir y"))
    check_command(["make", "test", "PYTHON=python3.12"])
    check_command(shlex.split("python recipes/language_model.py --text_files a b --output_dir runs/x > log.txt"))
    assert commands("a b && c | d\n") == [["a", "b"], ["c"], ["d"]]


def test_blocks_are_found(tmp_path: Path) -> None:
    page = tmp_path / "p.md"
    page.write_text(
        "x\n```python\na = 1\n```\n<!-- not run: needs a download -->\n```python\nb\n```\n- l\n  ```bash\n  ls\n  ```\n"
    )
    assert blocks(page, ("python",)) == [(3, "a = 1\n", True), (7, "b\n", False)]
    assert blocks(page, ("bash",)) == [(11, "ls\n", True)]


def test_the_index_lists_every_page() -> None:
    text = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"\]\(([^)#\s]+)\)", text))
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    notebooks = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.ipynb")}
    assert (pages | notebooks) - {"index.md"} == listed
