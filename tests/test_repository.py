"""What holds for the repository as a whole: the import map, forbidden calls, sizes, clean text."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rsllm"
SOURCES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted((ROOT / "experiments").rglob("*.py"))

# Top to bottom. A part may import its own layer (without a cycle) and those below.
LAYERS = (
    {"__main__"},
    {"cli"},
    {"start"},
    {"study", "serve", "export", "plan", "recommend"},
    {"flags"},
    {"pipeline", "docs", "doctor", "runs", "settings"},
    {"train"},
    {"report"},
    {"evaluate"},
    {"model", "prompts", "recommenders"},
    {"data"},
    {"compute"},
    {"assets"},
    {"store"},
    {"config", "errors", "terminal"},
)
LAYER = {part: depth for depth, parts in enumerate(LAYERS) for part in parts}

MAY_IMPORT = {
    "ray": (
        "compute/start.py",
        "data/prepare.py",
        "doctor.py",
        "evaluate/run.py",
        "flags.py",
        "pipeline.py",
        "recommend/users.py",
        "serve/",
        "study/",
        "train/launch.py",
        "train/worker.py",
        "train/stream.py",
    ),
    "deepspeed": ("train/engine.py", "train/zero.py"),
}

FORBIDDEN_MODULES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
FORBIDDEN_CALLS = {"__import__", "compile", "eval", "exec", "os.popen", "os.system"}
FORBIDDEN_CALLS |= {"torch.jit.load", "torch.load"}
FORBIDDEN_METHODS = {"mktemp", "read_pickle", "to_pickle", "unpack_archive"}
FORBIDDEN_YAML = {
    "full_load",
    "full_load_all",
    "load",
    "load_all",
    "unsafe_load",
    "unsafe_load_all",
}
FORBIDDEN_KEYWORDS = {("allow_pickle", True), ("weights_only", False), ("shell", True)}
REQUIRED_KEYWORDS = {
    "np.load": {"allow_pickle": False},
    "numpy.load": {"allow_pickle": False},
    "extractall": {"filter": "data"},
    "extract": {"filter": "data"},
    "from_config": {"trust_remote_code": False},
    "from_pretrained": {"trust_remote_code": False},
}
OF_MODELS = {
    "from_pretrained": {"trust_remote_code": False, "use_safetensors": True},
}
LOADS = ("load", "load_file", "safe_open", "from_pretrained", "read_table", "ParquetFile", "loads")
ENVIRONMENT_PARTS = {"get", "keys", "setdefault", "pop"}

ABSOLUTE_PATH = re.compile(r"(?<![\w.~/-])/(?:work|root|tmp)\b")


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def name(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names of all imports at any depth; `from a import b` gives both `a` and `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = "." * node.level + (node.module or "")
            yield source
            yield from (f"{source}.{alias.name}" for alias in node.names)


def parts_imported(tree: ast.AST) -> set[str]:
    names = (dotted.split(".") for dotted in imports(tree) if dotted.startswith("rsllm."))
    return {second for _, second, *_ in names if second != "__version__"}


def violations(tree: ast.AST) -> list[str]:
    found = [f"import {top}" for top in _tops(tree) & FORBIDDEN_MODULES]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            found += _call_violations(node)
        elif isinstance(node, ast.ExceptHandler):
            found += [f"{name} in an except of line {node.lineno}" for name in _loads(node)]
    return found + _whole_environments(tree)


def _loads(handler: ast.ExceptHandler) -> list[str]:
    """A load in an `except` is a second try, by other rules than the first."""
    calls = [node for node in ast.walk(handler) if isinstance(node, ast.Call)]
    names = [ast.unparse(call.func) for call in calls]
    return [function for function in names if function.split(".")[-1] in LOADS]


def _whole_environments(tree: ast.AST) -> list[str]:
    """Uses of `os.environ` that are not of one variable: it holds secrets."""
    parts = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Subscript)
        or (isinstance(node, ast.Attribute) and node.attr in ENVIRONMENT_PARTS)
    }
    return [
        f"os.environ as a whole in line {node.lineno}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and ast.unparse(node) == "os.environ"
        and id(node) not in parts
    ]


def _tops(tree: ast.AST) -> set[str]:
    return {dotted.split(".")[0] for dotted in imports(tree)}


def _call_violations(call: ast.Call) -> Iterator[str]:
    function = ast.unparse(call.func)
    *_, last = parts = function.split(".")
    if function in FORBIDDEN_CALLS or last in FORBIDDEN_METHODS:
        yield f"{function}() in line {call.lineno}"
    if "yaml" in parts and last in FORBIDDEN_YAML:
        yield f"{function}() in line {call.lineno}"
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    constants = {k: v.value for k, v in keywords.items() if isinstance(v, ast.Constant)}
    if function == "zip" and "strict" not in keywords:
        yield f"zip() without strict in line {call.lineno}"
    model = "from_" in last and "AutoModel" in function
    required = (OF_MODELS if model else {}).get(last) or REQUIRED_KEYWORDS.get(function)
    required = required or REQUIRED_KEYWORDS.get(last) or {}
    for keyword, value in required.items():
        if constants.get(keyword) != value:
            yield f"{function}() without {keyword}={value!r} in line {call.lineno}"
    for keyword, value in constants.items():
        if (keyword, value) in FORBIDDEN_KEYWORDS and keyword not in required:
            yield f"{keyword}={value} in line {call.lineno}"
    unsure = constants.get("trust_remote_code") is not False
    if unsure and "trust_remote_code" in keywords.keys() - required.keys():
        yield f"trust_remote_code that may be true in line {call.lineno}"


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_source_file(path: Path) -> None:
    tree = parse(path)
    assert violations(tree) == []
    assert path.read_bytes().isascii(), "ASCII in code"
    _hint_at_length(path, tree)


def _hint_at_length(path: Path, tree: ast.Module) -> None:
    """Length is no fault by itself: a function may be as long as its story."""
    functions = [
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    lengths = {"the file": len(path.read_text().splitlines()) - 340, **lengths}
    for what, length in lengths.items():
        if length > 60:
            print(f"hint: {what} of {name(path)} is long; does it tell one story?")


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import pandas as pd\npd.read_pickle(path)",
        "np.load(path, allow_pickle=True)",
        "f(weights_only=False)",
        "torch.load(path)",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "yaml.unsafe_load(text)",
        "ruamel.yaml.load_all(text)",
        "AutoModel.from_pretrained(path, trust_remote_code=flag, use_safetensors=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=True, use_safetensors=True)",
        "AutoTokenizer.from_pretrained(path, trust_remote_code=flag)",
        "AutoTokenizer.from_pretrained(path)",
        "AutoConfig.from_pretrained(path)",
        "AutoProcessor.from_pretrained(path, **settings)",
        "transformers.AutoModel.from_pretrained(path, trust_remote_code=False)",
        "AutoModelForCausalLM.from_config(config)",
        "kind.from_pretrained(path)",
        "AutoImageProcessor.from_pretrained(path, trust_remote_code=not safe)",
        "AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False)",
        "def f():\n    return zip(a, b)",
        "eval(text)",
        "exec(text)",
        "compile(text, 'x', 'exec')",
        "__import__(name)",
        "os.system(command)",
        "os.popen(command)",
        "subprocess.run(command, shell=True)",
        "torch.jit.load(path)",
        "np.load(path)",
        "archive.extractall(folder)",
        "archive.extractall(folder, filter='fully_trusted')",
        "tar.extract(member, folder)",
        "shutil.unpack_archive(path)",
        "tempfile.mktemp()",
        "try:\n    load_file(path)\nexcept ValueError:\n    np.load(path, allow_pickle=False)",
        "log(dict(os.environ))",
        "os.environ.items()",
    ],
)
def test_the_guard_sees(source: str) -> None:
    assert len(violations(ast.parse(source))) == 1


def test_the_guard_lets_pass() -> None:
    source = (
        "np.load(path, allow_pickle=False)\nyaml.safe_load(text)\nzip(a, b, strict=True)\n"
        "archive.extractall(folder, filter='data')\nre.compile(pattern)\nmodel.eval()\n"
        "json.load(file)\nos.environ['HOME'] + os.environ.get('USER')\n"
        "AutoTokenizer.from_pretrained(path, trust_remote_code=False)\n"
        "AutoConfig.from_pretrained(path, trust_remote_code=False)\n"
        "AutoModelForCausalLM.from_config(config, trust_remote_code=False)"
    )
    assert violations(ast.parse(source)) == []


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_run_no_code_of_models(path: Path) -> None:
    assert [found for found in violations(parse(path)) if "trust_remote_code" in found] == []


def test_one_script_reads_pickles() -> None:
    """Of verified files only, by a reader that builds nothing but frames of arrays."""
    readers = [path.name for path in SCRIPTS if _tops(parse(path)) & FORBIDDEN_MODULES]
    assert readers == ["import_llara.py"]


def code_lines(path: Path) -> int:
    """Lines that are neither blank, nor a comment, nor a docstring."""
    strings: set[int] = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            strings |= set(range(node.lineno, (node.end_lineno or 0) + 1))
    lines = enumerate(path.read_text().splitlines(), start=1)
    return sum(n not in strings and not re.match(r"\s*(#|$)", line) for n, line in lines)


def test_package_stays_small() -> None:
    """It has grown by what real files, backbones and history prompts ask for; it is to shrink."""
    count = sum(map(code_lines, SOURCES))
    print(f"{count} lines of code in {len(SOURCES)} files")
    assert count <= 14747


def test_imports_point_downwards() -> None:
    graph: dict[str, set[str]] = {}
    for path in SOURCES:
        importer = part(path)
        if importer == "__init__":
            continue
        assert importer in LAYER, f"{name(path)} is in no layer; see LAYERS"
        imported = parts_imported(parse(path)) - {importer}
        upwards = {other for other in imported if LAYER[other] < LAYER[importer]}
        assert not upwards, f"{name(path)} imports {upwards}, which are above it"
        graph.setdefault(importer, set()).update(imported)
    graphlib.TopologicalSorter(graph).prepare()


def test_imports_are_absolute() -> None:
    assert [name(p) for p in SOURCES if any(n.startswith(".") for n in imports(parse(p)))] == []


@pytest.mark.parametrize("library", MAY_IMPORT)
def test_platform_stays_in_its_place(library: str) -> None:
    importers = [name(path) for path in SOURCES if library in _tops(parse(path))]
    assert [file for file in importers if not file.startswith(MAY_IMPORT[library])] == []


def loaded_after(code: str) -> set[str]:
    """Which of torch and ray a fresh interpreter holds after running `code`."""
    code += "\nimport sys; print(*{'torch', 'ray'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.splitlines()[-1].split())


def test_import_loads_neither_torch_nor_ray() -> None:
    assert loaded_after("import ray") == {"ray"}
    assert loaded_after("import rsllm") == set()


@pytest.mark.skipif(not (PACKAGE / "cli.py").exists(), reason="there is no command line yet")
def test_help_loads_neither_torch_nor_ray() -> None:
    code = (
        "import contextlib, rsllm.cli, sys\nsys.argv = ['rsllm', '--help']\n"
        "with contextlib.suppress(SystemExit): rsllm.cli.main()"
    )
    assert loaded_after(code) == set()


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_what_is_installed_holds_every_file_that_code_reads() -> None:
    """An editable install shows no file that is missing from the package's data."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"]["rsllm"]
    packed = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
    read = {path for path in tracked_files() if PACKAGE in path.parents}
    read = {path for path in read if path.suffix != ".py" and path.name != "README.md"}
    assert read <= packed, f"not in package-data: {sorted(read - packed)}"


def tracked_files() -> list[Path]:
    """Files that are in git, or would be with the next `git add`."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / file for file in run.stdout.split("\0") if (ROOT / file).is_file()]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_text_names_no_path_of_one_machine() -> None:
    found = []
    for path in tracked_files():
        for number, line in enumerate(path.read_text(errors="ignore").splitlines(), 1):
            if ABSOLUTE_PATH.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert found == []
