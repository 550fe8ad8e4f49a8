"""Imports point one way, and only the modules that are about Ray import it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "bgray"

# Each layer may import from those above it, and from itself.
LAYERS = [
    {"problems", "overlap"},
    {"carried", "document", "sweep_config", "draws", "trackers"},
    {
        "config",
        "retries",
        "cluster_yaml",
        "spot",
        "band",
        "metrics",
        "muon",
        "probes",
        "starts",
        "warm",
        "instruments",
        "provenance",
        "fleet_state",
        "guards",
        "holder",
        "rungs",
        "tpe",
        "verdicts",
    },
    {"storage", "aws_check", "kuberay_check"},
    {"cluster_check"},
    {
        "notes",
        "lines",
        "schedules",
        "midi",
        "rendering",
        "bss",
        "boxplot",
        "encoding",
        "event_files",
        "growing",
        "varying",
    },
    {"hearing"},
    {"optim", "augment", "losses", "models"},
    {
        "resources",
        "session",
        "records",
        "lease_files",
        "leases",
        "shards",
        "sources",
        "layouts",
        "plan",
        "ingest",
        "shards_command",
    },
    {"checkpoint", "tracks"},
    {"console", "data"},
    {"unit_file", "feed_key", "feed_room", "prefetch"},
    {"feed_cache"},
    {"feed"},
    {"capacity"},
    {"tasks"},
    {"build"},
    {"transfer", "step"},
    {"choices"},
    {"conflicts", "loop", "ranks", "lineage"},
    {"experiment", "pbt"},
    {"context", "observe"},
    {"evaluation", "rehearsal"},
    {"logbook", "trial", "packing", "costs"},
    {"train", "search", "inference", "variants"},
    {"cells"},
    {"answers", "clips", "blind", "listening"},
    {"evaluate", "apply", "oracle", "plateau", "compare", "curves"},
    {"results", "specimen"},
    {"thinning", "drawing"},
    {"quality", "parallel"},
    {"figures"},
    {"reading"},
    {"agenda", "known", "screening", "cautions"},
    {"summary", "remote", "tuning", "forecast", "tensorboard", "sharing"},
    {"sweep", "shipment"},
    {"jobs"},
    {"fleet"},
    {"cluster"},
    {"findings"},
    {"report_clips"},
    {"report_text", "report_data"},
    {"report_page"},
    {"report"},
    {"watching", "details", "overview"},
    {"page"},
    {"dashboard"},
    {"devices", "bench_turns", "bench_ray", "bench_plain"},
    {"bench_makers", "bench_trial"},
    {"bench_feed", "bench_split"},
    {"bench_step"},
    {"bench_targets"},
    {"bench", "bench_page", "bench_sweep"},
]
# They hand work to Ray; `session` starts it. context and trial only ask a running Ray how many
# CPUs there are.
RAY = {"session", "feed", "ingest", "train", "tuning", "trial", "oracle", "evaluate"}
RAY |= {"spot", "capacity", "cluster_check", "kuberay_check", "fleet", "remote", "jobs"}
RAY |= {"bench_trial", "context", "fleet_state", "packing", "tpe", "tensorboard", "trackers"}
NO_TORCH = {"config", "storage", "records", "console", "band", "shards", "sources", "plan"}
NO_TORCH |= {"layouts", "midi", "rendering", "encoding", "instruments", "provenance"}
NO_TORCH |= {"verdicts", "variants", "compare", "sweep_config", "draws", "tpe"}
NO_TORCH |= {"retries", "spot", "resources", "cluster_yaml", "cluster_check", "aws_check"}
NO_TORCH |= {"cells", "curves", "results", "reading", "specimen"}
NO_TORCH |= {"thinning", "drawing", "quality", "parallel", "figures", "bench_page"}
NO_TORCH |= {"event_files", "trackers", "growing", "varying"}
NO_TORCH |= {"hearing", "answers", "clips", "blind", "listening"}
NO_TORCH |= {"watching", "details", "overview", "page", "dashboard"}
NO_TORCH |= {"notes", "findings", "report", "report_text", "report_data", "report_page"}
NO_TORCH |= {"report_clips", "starts", "warm", "bench_turns"}
NO_TORCH |= {"packing", "guards", "holder", "lines", "leases", "lease_files", "rungs"}


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


def test_a_process_that_only_makes_batches_starts_without_torch():
    code = "import sys, bgray.feed, bgray.tasks, bgray.augment\n"
    code += "print([name for name in ('torch', 'scipy.signal') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.stem)
def test_every_module_opens_with_one_sentence(path):
    doc = ast.get_docstring(ast.parse(path.read_text()))
    assert doc, f"{path.name} does not say what it owns"


def test_no_module_has_grown_past_four_hundred_lines():
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, f"{path.name}: look for the second job"
