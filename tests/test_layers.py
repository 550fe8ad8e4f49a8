"""Imports point one way, and only the modules that are about Ray import it."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "bgray"

# Each layer may import from those above it, and from itself.
LAYERS = [
    {"problems"},
    {"document"},
    {"config", "storage", "band", "metrics", "probes", "instruments"},
    {"schedules", "midi", "rendering", "bss", "boxplot", "encoding"},
    {"optim", "augment", "losses", "models"},
    {"cluster", "records", "shards", "sources", "layouts", "plan", "ingest", "shards_command"},
    {"checkpoint", "tracks"},
    {"console", "data", "resources"},
    {"tasks"},
    {"build"},
    {"conflicts", "loop", "ranks", "prefetch"},
    {"experiment"},
    {"context", "observe"},
    {"evaluation"},
    {"trial"},
    {"train", "search", "inference"},
    {"evaluate", "apply", "oracle", "plateau"},
    {"summary"},
    {"sweep"},
    {"bench"},
]
# They hand work to Ray; `cluster` starts it. context and trial only ask a running Ray how many
# CPUs there are.
RAY = {"cluster", "data", "ingest", "train", "sweep", "context", "trial", "oracle", "evaluate"}
NO_TORCH = {"config", "storage", "records", "console", "band", "shards", "sources", "plan"}
NO_TORCH |= {"layouts", "midi", "rendering", "encoding", "instruments"}


def modules():
    return sorted(
        p for p in PACKAGE.rglob("*.py") if p.name != "__main__.py" and p.parent == PACKAGE
    )


def name_of(path):
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imports(path, *, top_only=False):
    """Dotted names a file imports: in functions too, but not under TYPE_CHECKING."""
    tree = ast.parse(path.read_text())
    found = []
    nodes = tree.body if top_only else ast.walk(tree)
    typing_only = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.walk(node)
    }
    for node in nodes:
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda p: p.stem)
def test_a_module_imports_only_from_its_own_layer_and_those_above(path):
    name = name_of(path)
    if name == "__init__":
        return
    level = next((i for i, layer in enumerate(LAYERS) if name in layer), None)
    assert level is not None, f"{name} is in no layer: add it to the table"
    allowed = set().union(*LAYERS[: level + 1])
    used = {dotted.split(".")[1] for dotted in imports(path) if dotted.startswith("bgray.")}
    if name == "sources":
        used -= {"band"}
    assert used <= allowed, f"{name} imports {sorted(used - allowed)} from a layer below it"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.stem)
def test_ray_is_imported_only_where_work_is_handed_to_it_and_inside_functions(path):
    def uses_ray(names):
        return any(name.split(".")[0] == "ray" for name in names)

    assert not uses_ray(imports(path, top_only=True)), (
        "import Ray inside the function that needs it"
    )
    if uses_ray(imports(path)):
        assert name_of(path) in RAY


@pytest.mark.parametrize("name", sorted(NO_TORCH))
def test_reading_records_and_shards_needs_no_torch_at_import(name):
    assert "torch" not in {n.split(".")[0] for n in imports(PACKAGE / f"{name}.py", top_only=True)}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.stem)
def test_every_module_opens_with_one_sentence(path):
    doc = ast.get_docstring(ast.parse(path.read_text()))
    assert doc, f"{path.name} does not say what it owns"


def test_no_module_has_grown_past_four_hundred_lines():
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, f"{path.name}: look for the second job"
