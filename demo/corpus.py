"""Real text that is on every machine: what the installed Python and the installed packages say about themselves.

    python -m demo.corpus general  OUT.jsonl    the standard library and general packages: the pocket LM's training text
    python -m demo.corpus numpy    OUT.jsonl    docstrings of numpy: a domain, never in the training text
    python -m demo.corpus torch    OUT.jsonl    docstrings of torch.nn, torch.optim and more: another

A document is one module. A docstring that was already seen (numpy.ma repeats numpy's) is dropped, and for the domains
also one that mostly repeats lines of other modules, so that no text stands on both sides of a split by document. Files
are parsed, never imported or run.
"""

import ast
import hashlib
import importlib.metadata
import io
import json
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from importlib.util import find_spec
from inspect import cleandoc
from pathlib import Path

GENERAL = (
    "sympy", "networkx", "matplotlib", "huggingface_hub", "pip", "setuptools", "fontTools", "mypy", "pydantic",
    "hypothesis", "_pytest", "pygments", "grpc", "mypyc", "PIL", "rich", "pyparsing", "fsspec", "click", "jinja2",
    "pyarrow", "packaging", "anyio", "httpx", "fastapi", "starlette", "typer", "uvicorn",
)  # fmt: skip
DOMAINS = {
    "numpy": ("_core", "fft", "lib", "linalg", "ma", "random"),
    "torch": ("distributions", "nn", "optim"),
}  # the packages whose text the pocket LM has not seen, and the parts of them that the demo uses
SHORTEST = 40  # characters; below it a docstring is a heading, not text
REPEATED = 0.5  # of a docstring's lines may stand in other modules, in a domain
TELLING = 20  # characters from which on a line counts for that: "Parameters" and "Returns" stand everywhere


def stdlib_files() -> Iterator[tuple[str, Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not {"site-packages", "dist-packages", "__pycache__", "lib2to3", "idlelib"} & set(name.parts):
            yield f"python/{name.as_posix()}", path


def package_files(package: str, parts: tuple[str, ...] = ("",)) -> Iterator[tuple[str, Path]]:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"package {package} is not installed: run `make venv` first")
    root = Path(next(iter(spec.submodule_search_locations)))
    for part in parts:
        start = root / part
        for path in [start] if start.is_file() else sorted(start.rglob("*.py")):
            name = path.relative_to(root)
            if not {"tests", "testing", "_vendor", "__pycache__"} & set(name.parts):
                yield f"{package}/{name.as_posix()}", path


def texts_of(path: Path, *, comments: bool) -> Iterator[str]:
    """Docstrings of one file in source order, arguments of add_newdoc/add_docstr, and blocks of comments if asked."""
    try:
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # the test-suite of CPython holds files that are broken on purpose
        return
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                name = getattr(node, "name", "")
                found.append((getattr(node, "lineno", 0), f"{name}\n{text}" if name else text))
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in {"add_newdoc", "add_docstr"}:
            strings = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
            found.append((node.lineno, cleandoc(max(strings, key=len, default=""))))
    if comments:
        found += comment_blocks(source)
    yield from (text for _, text in sorted(found))


def comment_blocks(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of every run of whole-line comments."""
    block: list[str] = []
    last = -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT or token.line[: token.start[1]].strip():
            continue
        if token.start[0] != last + 1 and block:
            yield last, "\n".join(block)
            block = []
        block.append(token.string.lstrip("#").removeprefix(" ").rstrip())
        last = token.start[0]
    if block:
        yield last, "\n".join(block)


def documents(kind: str, parts: tuple[str, ...] = ()) -> Iterator[dict[str, str]]:
    """One {"id", "text"} per module with anything to say, in sorted order.

    kind: "general", a domain or, with `parts`, any installed package; "" is a part that means all of it.
    """
    if kind == "general":
        yield from topics()
        files = list(stdlib_files()) + [f for package in GENERAL for f in package_files(package)]
    else:
        files = list(package_files(kind, parts or DOMAINS[kind]))
    seen: set[bytes] = set()
    owners: dict[str, str] = {}  # line to the first module that has it
    for name, path in files:
        texts = []
        for text in texts_of(path, comments=name.startswith("python/")):
            body = text.partition("\n")[2] or text
            digest = hashlib.sha256("".join(body.split()).encode()).digest()
            if len(text) < SHORTEST or digest in seen or (kind != "general" and _repeats(body, name, owners)):
                continue
            seen.add(digest)
            texts.append(text)
        if texts:
            yield {"id": name, "text": "\n\n".join(texts)}


def _repeats(text: str, name: str, owners: dict[str, str]) -> bool:
    """Whether most telling lines of `text` stand in other modules. Lines of a text that is kept become `name`'s."""
    lines = [line for line in map(str.strip, text.splitlines()) if len(line) >= TELLING]
    repeated = sum(owners.get(line, name) != name for line in lines)
    if lines and repeated > REPEATED * len(lines):
        return True
    for line in lines:
        owners.setdefault(line, name)
    return False


def topics() -> Iterator[dict[str, str]]:
    """CPython's documentation topics (`help("LAMBDAS")`), one document each."""
    from pydoc_data.topics import topics as texts

    for name in sorted(texts):
        yield {"id": f"topics/{name}", "text": texts[name]}


def main() -> None:
    if len(sys.argv) != 3 or sys.argv[1] not in ("general", *DOMAINS):
        raise SystemExit(__doc__)
    print(write(sys.argv[1], Path(sys.argv[2])))


def write(kind: str, out: Path) -> str:
    """Write the documents as JSON lines. Returns one line that says what they are."""
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = list(documents(kind))
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "replace")
    out.write_bytes(data)
    version = sys.version.split()[0] if kind == "general" else importlib.metadata.version(kind)
    digest = hashlib.sha256(data).hexdigest()
    return f"{out}: {len(rows)} documents, {len(data):,} bytes, {kind} {version}, sha256 {digest}"


if __name__ == "__main__":
    main()
