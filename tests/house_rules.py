"""The rules of the house, each a function from the root of a tree to its breaches, `file:line: what`.

Knows nothing of this project but the names of its folders and files. Reads sources as text and syntax, imports none.
"""

import ast
import functools
import re
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("kernels_pallas", "models", "hybrid_jax")
LAYERS = (*PACKAGES, "scripts")  # imports go from the right to the left
HOST_WING = (
    *("config", "request", "step", "pool", "prefix_tree", "prefix_cache", "entry", "scheduler", "memory", "buckets"),
    *("stats", "constraint"),
)
DEVICE_LIBRARIES = {"jax", "jaxlib", "flax", "orbax", "optax", "models", "kernels_pallas"}
LOWER_LAYER_LIBRARIES = {
    "kernels_pallas": {"jax", "jaxtyping", "numpy"},
    "models": {"flax", "jax", "jaxtyping", "numpy"},
}
IMPORT_NAMES = {"orbax-checkpoint": "orbax"}  # where it is not the name of the distribution
FOREIGN_VARIABLES = ("JAX_", "XLA_", "LIBTPU_", "TPU_", "CUDA_", "NCCL_", "HF_")
VAGUE = r"utils?|common|helpers?|managers?|wrappers?|base"
# Distinctive names anywhere in a word; the two that are also parts of English words alone.
KIND = re.compile(r"lightning|gdn|kda|mamba|bailing|qwen|kimi|nemotron|minimax|\bling\b|\bring\b", re.IGNORECASE)
LEAK = re.compile(
    r"https?://[\w.-]*(?:pypi|pythonhosted|npm|debian)|(?:pypi|pythonhosted|npmjs)[.](?:org|com)"
    r"|(?<![\w.$}])/(?:work|root|home/\w+|Users/\w+)/|[.]{2}/shared"
)
UNFINISHED = re.compile("TO" + r"DO|FIX" + "ME")
PINNED = re.compile(r"[a-z0-9-]+==[0-9][0-9a-z.+]*|#.*|")
DATA_SUFFIXES = {".json", ".jsonl", ".jinja"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DEFINITIONS = (*FUNCTIONS, ast.ClassDef)


@dataclass(frozen=True)
class Source:
    """A Python file: its path from the root, with slashes, and its text."""

    path: str
    text: str

    @property
    def tree(self) -> ast.Module:
        return parse(self.text, self.path)

    @property
    def layer(self) -> str:
        return self.path.split("/")[0]

    def at(self, node: ast.AST | int, what: str) -> str:
        return f"{self.path}:{node if isinstance(node, int) else getattr(node, 'lineno', 1)}: {what}"


@functools.cache
def parse(text: str, path: str) -> ast.Module:
    return ast.parse(text, filename=path)


def tracked_files(root: Path) -> list[Path]:
    """What git tracks or would add; in a tree without git, all but caches and hidden folders other than `.ci`."""
    if (root / ".git").exists():
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout
        found = [root / name for name in listed.split("\0") if name]
    else:
        found = [path for path in root.rglob("*") if not hidden(path.relative_to(root))]
    return sorted(path for path in found if path.is_file())


def hidden(path: Path) -> bool:
    folders = path.parts[:-1]
    return any(name == "__pycache__" or (name.startswith(".") and name != ".ci") for name in folders)


def read_text(path: Path) -> str | None:
    """The text of a file, None of a binary one."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


def sources(root: Path, *folders: str) -> Iterator[Source]:
    """The Python files in these folders of the root."""
    for path in tracked_files(root):
        name = path.relative_to(root)
        if path.suffix == ".py" and name.parts[0] in folders:
            yield Source(name.as_posix(), path.read_text(encoding="utf-8"))


def search_lines(root: Path, pattern: re.Pattern[str], skipped_suffixes: set[str]) -> Iterator[str]:
    for path in tracked_files(root):
        text = None if path.suffix in skipped_suffixes else read_text(path)
        for number, line in enumerate((text or "").splitlines(), start=1):
            if found := pattern.search(line):
                yield f"{path.relative_to(root).as_posix()}:{number}: {found[0]!r}"


def imports(source: Source) -> Iterator[tuple[ast.AST, str]]:
    """Every module imported anywhere in the file, by its absolute name; `from a import b` gives `a.b`."""
    package = source.path.split("/")[:-1]
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else []
            module = [*start, *([node.module] if node.module else [])]
            yield from ((node, ".".join([*module, alias.name])) for alias in node.names)


def functions(source: Source) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, int]]:
    """Every function, also inner ones, and its lines from `def` to the end."""
    for node in ast.walk(source.tree):
        if isinstance(node, FUNCTIONS):
            yield node, (node.end_lineno or node.lineno) - node.lineno + 1


# ---------------------------------------------------------------------------------------------------------- imports


def imports_go_down(root: Path) -> Iterator[str]:
    """scripts -> hybrid_jax -> models -> kernels_pallas; nothing imports tests."""
    for source in sources(root, *LAYERS):
        higher = {*LAYERS[LAYERS.index(source.layer) + 1 :], "tests"}
        for node, name in imports(source):
            if name.split(".")[0] in higher:
                yield source.at(node, f"{source.layer} imports {name}, which lies above it")


def libraries_fit_the_layer(root: Path) -> Iterator[str]:
    """Kernels see JAX, models also Flax; neither reads files or speaks to the outside through a library."""
    for source in sources(root, *LOWER_LAYER_LIBRARIES):
        allowed = LOWER_LAYER_LIBRARIES[source.layer] | set(PACKAGES) | sys.stdlib_module_names
        for node, name in imports(source):
            if name.split(".")[0] not in allowed:
                yield source.at(node, f"{source.layer} imports {name}")


def libraries_are_declared(root: Path) -> Iterator[str]:
    """What the wheel imports is among its dependencies or in the extra `hub`, `serve` or `ray`."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project.get("optional-dependencies", {})
    wanted = [*project["dependencies"], *(each for name in ("hub", "serve", "ray") for each in extras.get(name, []))]
    names = [re.split(r"[^\w-]", requirement)[0] for requirement in wanted]
    declared = {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in names}
    for source in sources(root, *PACKAGES):
        for node, name in imports(source):
            if name.split(".")[0] not in declared | set(PACKAGES) | sys.stdlib_module_names:
                yield source.at(node, f"{name} is in no dependency of pyproject.toml")


def host_wing_is_free_of_devices(root: Path) -> Iterator[str]:
    """The modules that plan on the host import no device library, and of hybrid_jax only one another."""
    friends = {f"hybrid_jax.{name}" for name in HOST_WING}
    for source in sources(root, "hybrid_jax"):
        if source.path.removeprefix("hybrid_jax/").removesuffix(".py") not in HOST_WING:
            continue
        for node, name in imports(source):
            top, own = name.split(".")[0], ".".join(name.split(".")[:2])
            if top in DEVICE_LIBRARIES or (top == "hybrid_jax" and own not in friends):
                yield source.at(node, f"the host wing imports {name}")


# ------------------------------------------------------------------------------------------------------------ sizes


def files_are_short(root: Path) -> Iterator[str]:
    """At most 400 lines, 700 among the kernels."""
    for source in sources(root, *LAYERS, "tests"):
        count, limit = source.text.count("\n"), 700 if source.layer == "kernels_pallas" else 400
        if count > limit:
            yield source.at(count, f"{count} lines, at most {limit}: which noun is missing?")


def functions_are_short(root: Path) -> Iterator[str]:
    """At most 60 lines, 150 where a Pallas kernel's body is."""
    for source in sources(root, *LAYERS, "tests"):
        limit = 150 if re.fullmatch(r"kernels_pallas/(\w+/)?\w*(tpu|gpu)\w*\.py", source.path) else 60
        for node, lines in functions(source):
            if lines > limit:
                yield source.at(node, f"{node.name} has {lines} lines, at most {limit}")


def functions_are_short_in_the_median(root: Path) -> Iterator[str]:
    """Under 15 lines over the packages and scripts."""
    lengths = [lines for source in sources(root, *LAYERS) for _, lines in functions(source)]
    if lengths and statistics.median(lengths) >= 15:
        yield f".:1: the median function of {len(lengths)} has {statistics.median(lengths)} lines, wanted under 15"


# ------------------------------------------------------------------------------------------------------------ names


def engine_names_no_kind(root: Path) -> Iterator[str]:
    """hybrid_jax knows neither kinds nor families: not in code, strings or comments."""
    for source in sources(root, "hybrid_jax"):
        for number, line in enumerate([source.path, *source.text.splitlines()]):
            if found := KIND.search(line):
                yield source.at(number, f"the engine names {found[0]!r}")


def files_have_nouns(root: Path) -> Iterator[str]:
    """No file or folder is called by a word that fits anything, or by a number; a family keeps its own."""
    for path in tracked_files(root):
        name = path.relative_to(root)
        vague = VAGUE if "models" in name.parts[:-1] else rf"{VAGUE}|v\d+"
        if any(re.fullmatch(rf"(.+_)?({vague})(_.+)?", part.split(".")[0], re.IGNORECASE) for part in name.parts):
            yield f"{name.as_posix()}:1: name it by the noun it defines"


def classes_have_nouns(root: Path) -> Iterator[str]:
    """No class either."""
    for source in sources(root, *LAYERS):
        for node in ast.walk(source.tree):
            if isinstance(node, ast.ClassDef) and re.fullmatch(
                r"_?(Base[A-Z].*|.*(Utils?|Helper|Manager|Wrapper|Base|Mixin|V\d))", node.name
            ):
                yield source.at(node, f"class {node.name}")


# --------------------------------------------------------------------------------------------------------- language


def nobody_asks_for_attributes(root: Path) -> Iterator[str]:
    """No `hasattr`: a value's type says what it has."""
    yield from names_used(root, {"hasattr"})


def nothing_is_run_from_data(root: Path) -> Iterator[str]:
    """No eval, exec or pickle: a checkpoint is data."""
    yield from names_used(root, {"eval", "exec", "__import__"})
    for source in sources(root, *LAYERS):
        for node, name in imports(source):
            if name.split(".")[0] in {"pickle", "dill", "cloudpickle", "marshal", "shelve"}:
                yield source.at(node, f"imports {name}")
        for node in ast.walk(source.tree):
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and getattr(node.value, "value", True):
                yield source.at(node, "allow_pickle")


def names_used(root: Path, names: set[str]) -> Iterator[str]:
    for source in sources(root, *LAYERS):
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Name) and node.id in names:
                yield source.at(node, f"uses {node.id}")


def parameters_are_named(root: Path) -> Iterator[str]:
    """No `**kwargs` parameter."""
    for source in sources(root, *LAYERS):
        for node in ast.walk(source.tree):
            if isinstance(node, ast.arguments) and node.kwarg:
                yield source.at(node.kwarg, f"takes **{node.kwarg.arg}")


def no_environment_variables_of_our_own(root: Path) -> Iterator[str]:
    """The environment is touched only under the literal name of a variable of JAX, XLA, the hub or a device driver."""
    for source in sources(root, *LAYERS):
        allowed = [foreign_variable(node) for node in ast.walk(source.tree)]
        for node in ast.walk(source.tree):
            if touches_environment(node) and node not in allowed:
                yield source.at(node, "touches the environment; settings belong into EngineConfig")


def touches_environment(node: ast.AST) -> bool:
    """`os.environ`, `os.getenv`, `os.putenv`, or an import of one of them."""
    words = {"environ", "environb", "getenv", "putenv"}
    if isinstance(node, ast.ImportFrom):
        return node.module == "os" and any(alias.name in words for alias in node.names)
    return isinstance(node, ast.Attribute) and node.attr in words


def foreign_variable(node: ast.AST) -> ast.AST | None:
    """`os.environ` or `os.getenv` in `os.environ["JAX_..."]`, `os.environ.get("JAX_...")`, `os.getenv("JAX_...")`."""
    if isinstance(node, ast.Subscript):
        place, key = node.value, node.slice
    elif isinstance(node, ast.Call) and node.args and isinstance(node.func, ast.Attribute):
        place, key = (node.func if touches_environment(node.func) else node.func.value), node.args[0]
    else:
        return None
    foreign = isinstance(key, ast.Constant) and str(key.value).startswith(FOREIGN_VARIABLES)
    return place if foreign else None


# ------------------------------------------------------------------------------------------------------------- text


def everything_public_is_described(root: Path) -> Iterator[str]:
    """Modules, and the public functions and classes at their top, have a docstring."""
    for source in sources(root, *LAYERS):
        if not ast.get_docstring(source.tree):
            yield source.at(1, "the module has no docstring")
        for node in source.tree.body:
            if isinstance(node, DEFINITIONS) and not node.name.startswith("_") and not ast.get_docstring(node):
                yield source.at(node, f"{node.name} has no docstring")


def nothing_is_left_to_do(root: Path) -> Iterator[str]:
    """No notes of unfinished work; the tokens of a vocabulary may say anything."""
    yield from search_lines(root, UNFINISHED, DATA_SUFFIXES)


def nothing_tells_of_a_machine(root: Path) -> Iterator[str]:
    """No paths of somebody's machine, no hosts of package indexes."""
    yield from search_lines(root, LEAK, set())


def versions_are_pinned_in_one_file(root: Path) -> Iterator[str]:
    """constraints.txt holds `name==version` and comments, no address and no hash; there is no lock file."""
    for number, line in enumerate((root / "constraints.txt").read_text(encoding="utf-8").splitlines(), start=1):
        if not PINNED.fullmatch(line):
            yield f"constraints.txt:{number}: {line!r} is no name==version"
    for path in tracked_files(root):
        if path.suffix == ".lock" or path.name in {"conda-lock.yml", "package-lock.json"}:
            yield f"{path.relative_to(root).as_posix()}:1: a lock file"


RULES: tuple[Callable[[Path], Iterator[str]], ...] = (
    imports_go_down,
    libraries_fit_the_layer,
    libraries_are_declared,
    host_wing_is_free_of_devices,
    files_are_short,
    functions_are_short,
    functions_are_short_in_the_median,
    engine_names_no_kind,
    files_have_nouns,
    classes_have_nouns,
    nobody_asks_for_attributes,
    nothing_is_run_from_data,
    parameters_are_named,
    no_environment_variables_of_our_own,
    everything_public_is_described,
    nothing_is_left_to_do,
    nothing_tells_of_a_machine,
    versions_are_pinned_in_one_file,
)
