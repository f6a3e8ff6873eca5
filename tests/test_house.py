"""The rules of the house, and the tools it trusts; each is shown to catch a planted fault."""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_constants import test_every_constant_stands_in_the_table  # noqa: F401  a rule of the house, planted there

from cinemesh.kernels.ops import OPS

ROOT = Path(__file__).parent.parent
FOLDERS = (
    "kernels",
    "parallel",
    "model",
    "data",
    "perf_model",
    "evaluation",
    "launch",
)  # each imports from its left only
# setup.py is no part of the package
ROOT_MODULES = ("__init__", "documents", "errors", "files", "interrupt", "memory", "ranges", "reading")
LONGEST_FILE = 400  # lines
LONGER_WITH_REASON: dict[str, str] = {  # path -> why it is not two files
    "kernels/reference.py": "the truth of every op, in the order of the op table",
    "parallel/ir/builder.py": "one class: the records and their checks share all of its state",
    "launch/commands/reply.py": "every record of --json, in the order of docs/json.md, which is made of them",
}

# Rooms of a folder, from the left: each imports from its left only, and from itself.
ROOMS: dict[str, tuple[tuple[str, ...], ...]] = {
    "parallel": (("ir",), ("layers", "passes"), ("runtime",)),
    "perf_model": (("clusters",), ("prices",), ("search", "published"), ("report", "calibration")),
    "launch": (
        ("storage",),
        ("cluster", "jobs"),
        ("training", "proof"),
        ("exchange", "health", "tae"),
        ("commands",),
        ("acceptance", "doors"),
    ),
}
# Code lines of kernels without Triton, parallel and model without its autoencoder: 8,000, and what stands in the core
# so that nothing else need state it: check() (230 lines), and the op table's counts, which price and proof read
# (180); and host memory as a second space (256): pass, copies on streams, arena and live bytes of its own, their
# witness, and the choice of what goes there; and what a device holds beside a program, with the workspace of the
# kernels that run (95), which preflight, planner and runtime counted apart; and what a failed capture leaves of torch
# (21); and sums of rows on CUDA in one order, and what the catalogue says of orders (15); and copies from pinned
# memory (3); and what hosts agree on over a tree, with the count of every socket (75); and what NCCL and driver make
# of the order of collectives (33). What the first GPU showed: bytes that packages copy, and what a kernel that cannot
# be built raised (9). A watchdog is told how many calls of all hosts a rank began and ended (11). And of sampling:
# schedules and solvers as data, guidance as one batch of two, captured velocities (78). And of low-rank factors
# beside frozen weights (234): their rows, units in two flat shards, forward and backward, and what needs no gradient.
# And of halves of guided samples on two groups of ranks (20). And which records are rehearsed before a capture, in
# place of two whole steps a shape, and what a host waited for others (80). And a clip sampled in windows that overlap
# (121). And of the ablations: objectives with their paths, two ops of v-prediction, the block of DiT with its ops, in
# builder and reference (395). And frozen layers in shards beside a program: bytes and gathers (75). And marks, by
# which a step tells a watchdog how far it is where no host runs it: where they stand, the pass, the check (85). And
# steps that are made without Python's collector (10). And the blueprint of a step, from which any process builds it,
# placed once (42). And what a program keeps of its records and hands on, and orders that count memory where there is
# a choice: a quarter of what building, ordering and pricing one took (74). And bytes that ranks hand on after a loss
# (14). Less what was said twice (372): products of a block and their backward, the forward pass of step and sampler,
# where a result fits, labels and views of attention; and what only tests asked.
CORE_LINES = 9784
READ = (".csv", ".html", ".sh", ".yaml")  # suffixes of files that modules read
FAN_OUT = 15  # modules of the package that a file imports
WIDER_WITH_REASON: dict[str, str] = {  # path -> why
    "launch/commands/asked.py": "options, or a recipe under them, become what the planner is asked: it reads both",
    "model/runner.py": "one rank of a step: where program, executor, capture and model meet",
    "model/sampler.py": "one rank of a sampler: where program, executor, capture and model meet",
    "perf_model/report/explain.py": "asks every price and the search, and computes nothing itself",
    "launch/cli.py": "a door for each group of commands",
    "launch/commands/calibrate.py": "measures compute and links, fits, and writes: a line of each",
    "launch/commands/kernels.py": "a command with three modes: show, compile, tune",
    "launch/health/ranks.py": "all that a job is asked at once: software, clocks, compute, links",
    "launch/training/setting.py": "what a recipe stands for, built in one place: codec, encoders, model, steps, marks",
    "launch/proof/verify.py": "the proof from the case to what is printed of it: shrinks, runs the ranks, counts",
    "launch/training/recipe.py": "every section of a recipe, each with the ranges and rules of what it sets",
    "launch/training/start.py": "where checkpoint, model, position tables and codec of two runs meet",
    "launch/training/sample.py": "where recipe, checkpoint, processes and sampler meet",
    "launch/commands/upsample.py": "what is asked for is held against checkpoint, recipe, clips, model and memory",
    "launch/training/upsampling.py": "where checkpoint, recipe, clips, processes and sampler meet",
    "launch/training/replay.py": "a run once more, to one step: it meets what the loop meets",
    "data/curate/pipeline.py": "a run of curation: where files, measures, stages and captions meet",
    "data/curate/settings.py": "every stage's limits and every measure's parameters: one field each",
    "launch/training/loop.py": "where recipe, data, buckets, checkpoints and reports of a run meet at its start",
    "launch/training/steps.py": "where data, steps, reports, validation and checkpoints of a run meet",
    "launch/tae/loop.py": "where data, steps, reports, reconstructions and checkpoints of a run meet",
    "launch/tae/checkpoints.py": "an autoencoder's checkpoints, of the parts of the transformer's",
    "launch/commands/trace.py": "runs a step, plays it, and shows both beside each other",
    "launch/commands/plan.py": "the command that searches, tunes, explains, reports and writes",
}
TOLD_FROM = 12  # lines from which a public function has a docstring
TWICE_WITH_REASON: dict[str, str] = {  # public name -> why it stands in more than one file
    "TIME_FEATURES": "an export's code has no package around it",
    "Block": "the block as records and as its specification: the same thing twice is what parity compares",
    **dict.fromkeys(
        ("as_json", "check", "fit", "launch", "load", "sample", "search", "show", "write"), "a verb, told by its module"
    ),
    **dict.fromkeys(
        ("BLOCK", "DTYPES", "FOLDER", "GREY", "GROUPS", "HALF", "ITEM_BYTES", "OPTIMIZER", "RATES", "ROUNDS", "STAGES"),
        "a file's own constant; where a neighbour imports one, it says from where",
    ),
    **dict.fromkeys(("TOKENS", "UNIT"), "a tile of Triton's beside an axis or a class of memory"),
}

# Planning runs where no torch is installed. A module outside this list joins it by ending the first
# line of its docstring in "(torch-free)."; all of perf_model is in it but for NEEDS_TORCH.
TORCH_FREE = {
    *("documents", "errors", "files", "interrupt", "memory", "ranges", "reading"),
    *("kernels.ops", "kernels.catalogue"),
    *(
        f"parallel.{name}"
        for name in (
            *("ir.plan", "ir.program", "ir.layout", "ir.units"),
            *("layers.tensor", "layers.context", "layers.sharded"),
            *("passes.recompute", "passes.schedule", "passes.prefetch", "passes.liveness"),
            *("ir.records", "ir.check"),
        )
    ),
    *("model.config", "model.backbone", "model.step"),
    *("launch.cli", "launch.commands.show"),
}
NEEDS_TORCH = {"perf_model.report.report", "perf_model.calibration.calibrate"}

COLLECTIVES = (
    *("all_gather", "all_reduce", "all_to_all", "reduce_scatter", "broadcast", "barrier"),
    *("gather", "scatter", "reduce", "send", "recv", "isend", "irecv", "batch_isend_irecv"),
    *("monitored_barrier", "P2POp", "_coalescing_manager"),
)
COLLECTIVE_FAMILIES = (
    *("all_gather_", "all_reduce_", "all_to_all_", "reduce_scatter_", "broadcast_"),
    *("_all_gather", "_reduce_scatter", "scatter_object", "gather_object", "send_obj", "recv_obj"),
)
GROUP_METHODS = ("allreduce", "allgather", "alltoall", "_allgather_base", "_reduce_scatter_base")
THE_ONE_DOOR = "parallel/runtime/comm.py"
THE_ONE_READER = "documents.py"
ENTRY, RESOLVER = "launch.train", "launch.training.resolve"  # of training; of a run's plan, before its mesh exists


def sources(root: Path) -> Iterator[Path]:
    """The package's files. Never walks ``root`` itself: it holds .venv."""
    yield from (root / f"{name}.py" for name in ROOT_MODULES if (root / f"{name}.py").exists())
    for folder in FOLDERS:
        yield from sorted((root / folder).rglob("*.py"))


def name_of(path: Path, root: Path) -> str:
    """Dotted name below the package: parallel/plan.py is "parallel.plan", the root is ""."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def tree_of(path: Path) -> ast.Module:
    """The parsed file."""
    return ast.parse(path.read_text())


def imports(path: Path, root: Path) -> Iterator[tuple[int, str, bool]]:
    """(line, dotted target, is of this package) of each import; one target for each imported name.

    Targets of this package are named as by ``name_of``. ``from X import y`` gives "X.y", since y
    may be a module.
    """
    package = path.relative_to(root).parent.parts
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, False
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            stem = ".".join(part for part in (start, node.module) if part)
            for alias in node.names:
                yield node.lineno, f"{stem}.{alias.name}".lstrip("."), node.level > 0


def place(path: Path, root: Path, line: int) -> str:
    """``folder/file.py:line``."""
    return f"{path.relative_to(root)}:{line}"


def check_imports(root: Path) -> list[str]:
    """Imports inside the package are relative and go to the left in FOLDERS."""
    found = []
    for path in sources(root):
        folder = path.relative_to(root).parts[0]
        allowed = FOLDERS[: FOLDERS.index(folder) + 1] if folder in FOLDERS else ()
        for line, target, inside in imports(path, root):
            top = target.split(".")[0]
            if not inside and top in (*FOLDERS, *ROOT_MODULES, "configs", "cinemesh", "tests"):
                found.append(f"{place(path, root, line)}: import of {target} is not relative")
            elif inside and top in FOLDERS and top not in allowed:
                found.append(f"{place(path, root, line)}: {folder} may not import {top}")
    return found


def check_rooms(root: Path) -> list[str]:
    """Rooms of a folder import what stands to their left in ROOMS; data and perf_model do not know each other."""
    found = []
    for path in sources(root):
        folder, *rest = path.relative_to(root).parts
        order = ROOMS.get(folder, ())
        here = next((i for i, rooms in enumerate(order) if rest and rest[0] in rooms), len(order))
        for line, target, inside in imports(path, root):
            top, *parts = target.split(".")
            if not inside:
                continue
            if {folder, top} == {"data", "perf_model"}:
                found.append(f"{place(path, root, line)}: {folder} may not import {top}")
            if top == folder and parts and parts[0] != (rest[0] if rest else ""):
                there = next((i for i, rooms in enumerate(order) if parts[0] in rooms), -1)
                if there >= here or (there < 0 and here < len(order) and (root / folder / parts[0]).is_dir()):
                    found.append(f"{place(path, root, line)}: {folder}/{rest[0]} may not import {folder}/{parts[0]}")
    return found


def check_cycles(root: Path) -> list[str]:
    """No module imports itself through others, imports inside functions counted."""
    modules = {name_of(path, root): path for path in sources(root)}
    graph: dict[str, set[str]] = {name: set() for name in modules}
    for name, path in modules.items():
        for _, target, inside in imports(path, root):
            wanted = target if target in modules else target.rpartition(".")[0]
            if inside and wanted in modules and wanted:
                graph[name].add(wanted)
    found, done = [], set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        if name in trail:
            found.append(" -> ".join((*trail[trail.index(name) :], name)))
        elif name not in done:
            for target in sorted(graph[name]):
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())
    return found


def check_collectives(root: Path) -> list[str]:
    """Only parallel/runtime/comm.py names a collective of torch.distributed.

    Groups (new_group, init_process_group) and torch.distributed.checkpoint are no collectives.
    """
    found = []
    for path in sources(root):
        if path == root / THE_ONE_DOOR:
            continue
        # What each local name stands for, so that "dist" and any other alias is seen through.
        stands_for: dict[str, str] = {"torch": "torch"}
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Import):
                stands_for |= {a.asname: a.name for a in node.names if a.asname}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                stands_for |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ImportFrom) and not node.level:
                full_names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Attribute):
                base, _, rest = ast.unparse(node).partition(".")
                full_names = [f"{stands_for.get(base, base)}.{rest}"]
            else:
                continue
            found += [
                f"{place(path, root, node.lineno)}: {name} outside {THE_ONE_DOOR}"
                for name in full_names
                if is_collective(name)
            ]
    return found


def is_collective(name: str) -> bool:
    """Whether a dotted name is a collective of torch.distributed, a process group or c10d's ops."""
    parent, _, last = name.rpartition(".")
    if parent.startswith(("torch.ops._c10d_functional", "torch.ops.c10d")):
        return True
    if last.startswith(GROUP_METHODS):  # on any object: a group may have any name
        return True
    if not parent.startswith("torch.distributed") or ".checkpoint" in parent:
        return False
    return last in COLLECTIVES or last == "_functional_collectives" or last.startswith(COLLECTIVE_FAMILIES)


ALONE = "launch/exchange/movie_gen.py"  # code of an export, which has no package around it


def check_readers(root: Path) -> list[str]:
    """Only documents.py reads YAML and JSON, or writes YAML: every file is read by the same strict rules."""
    found = []
    for path in sources(root):
        if path == root / ALONE:
            continue
        named = {target.split(".")[0]: line for line, target, inside in imports(path, root) if not inside}
        if path != root / THE_ONE_READER and "yaml" in named:
            found.append(f"{place(path, root, named['yaml'])}: yaml outside {THE_ONE_READER}")
        for node in ast.walk(tree_of(path)):
            if path != root / THE_ONE_READER and ast.unparse(node) in ("json.load", "json.loads", "JSONDecoder"):
                found.append(f"{path.relative_to(root)}: {ast.unparse(node)} outside {THE_ONE_READER}")
    return found


def check_runtime_ignores_prices(root: Path) -> list[str]:
    """What runs a step, and all that it imports of this package, never imports perf_model.

    What resolves a run before its mesh exists may; only the entry of training may import that.
    """
    modules = {name_of(path, root): path for path in sources(root)}
    start = {name for name in modules if name.split(".")[0] in ("kernels", "parallel", "model")}
    waiting = sorted(start | ({ENTRY, "launch.training.loop"} & modules.keys()))
    seen, found = set(waiting), []
    while waiting:
        name = waiting.pop()
        for line, target, inside in imports(modules[name], root):
            wanted = target if target in modules else target.rpartition(".")[0]
            if inside and wanted == RESOLVER and name == ENTRY:
                continue
            if inside and (target.split(".")[0] == "perf_model" or wanted == RESOLVER):
                found.append(f"{place(modules[name], root, line)}: the runtime imports {target}")
            elif inside and wanted in modules and wanted not in seen:
                waiting.append(wanted)
                seen.add(wanted)
    return found


def check_errors(root: Path) -> list[str]:
    """An error is read by its fields: its text is for people.

    ``str(error)`` may only be handed on, whole; what a message tells to do is its ``remedy``, not the end of a text.
    """
    found = []
    for path in sources(root):
        tree = tree_of(path)
        caught = {node.name for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler) and node.name}
        above = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.expr) and is_text_of(node, caught) and not is_handed_on(node, above[node]):
                found.append(f"{place(path, root, node.lineno)}: reads the text of an error; give the error a field")
            elif isinstance(node, ast.Attribute) and node.attr == "args" and names(node.value, caught):
                found.append(f"{place(path, root, node.lineno)}: reads the arguments of an error")
            elif isinstance(node, ast.Call) and names(node.func, {"CinemeshError"}) and node.args:
                texts = [part.value for part in ast.walk(node.args[0]) if isinstance(part, ast.Constant)]
                if any("; " in text for text in texts if isinstance(text, str)):
                    found.append(f"{place(path, root, node.lineno)}: what follows '; ' is the remedy: name it so")
    return found


def names(node: ast.AST, wanted: set[str]) -> bool:
    return isinstance(node, ast.Name) and node.id in wanted


def is_text_of(node: ast.AST, errors: set[str]) -> bool:
    """``str(error)``, ``repr(error)``, ``f"{error}"`` of a caught error."""
    if isinstance(node, ast.Call) and names(node.func, {"str", "repr"}):
        return any(names(value, errors) for value in node.args)
    return isinstance(node, ast.JoinedStr) and any(
        isinstance(value, ast.FormattedValue) and names(value.value, errors) for value in node.values
    )


def is_handed_on(text: ast.AST, to: ast.AST) -> bool:
    """Whether a text is taken whole: not searched, cut or, when it is nothing but the error's, kept for later."""
    if isinstance(to, ast.Call):
        return not ast.unparse(to.func).startswith("re.")
    kept = isinstance(to, ast.Assign | ast.AnnAssign | ast.NamedExpr) and not isinstance(text, ast.JoinedStr)
    return not kept and not isinstance(to, ast.Attribute | ast.Compare | ast.Subscript)


def check_lengths(root: Path) -> list[str]:
    """A file has one purpose; past LONGEST_FILE lines it rarely has."""
    counts = {str(path.relative_to(root)): len(path.read_text().splitlines()) for path in sources(root)}
    return [
        f"{path} has {lines} lines; split it, or list it with a reason"
        for path, lines in counts.items()
        if lines > LONGEST_FILE and path not in LONGER_WITH_REASON
    ]


def code_lines(path: Path) -> int:
    """Lines that are neither blank nor comment nor docstring."""
    told: set[int] = set()
    for node in ast.walk(tree_of(path)):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if documented and ast.get_docstring(node) is not None:
            told.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    lines = enumerate(path.read_text().splitlines(), 1)
    return sum(1 for i, line in lines if line.strip() and not line.strip().startswith("#") and i not in told)


def imports_triton(path: Path, root: Path) -> bool:
    """Whether it is a kernel of Triton's, or runs one."""
    return any(target.split(".")[0] == "triton" for _, target, inside in imports(path, root) if not inside)


def check_core_size(root: Path) -> list[str]:
    """The core, kernels without Triton, parallel and model, stays small enough to be read."""
    core = [path for path in sources(root) if path.relative_to(root).parts[0] in ("kernels", "parallel", "model")]
    core = [path for path in core if not imports_triton(path, root) and "tae" not in path.parts]
    lines = sum(map(code_lines, core))
    return [f"the core has {lines} code lines, {CORE_LINES} are its ceiling"] if lines > CORE_LINES else []


def check_versions(root: Path) -> list[str]:
    """A checkout on the path alone is not installed: ``version_of`` answers for it, importlib's own raises."""
    asked = [path for path in sources(root) if "importlib.metadata" in path.read_text(encoding="utf-8")]
    return [f"{path}: asks for versions itself" for path in asked if path != root / "kernels" / "packages.py"]


def check_encodings(root: Path) -> list[str]:
    """A text file is read and written as UTF-8, whatever the locale says; ``av.open`` opens videos."""
    found = []
    for path in sources(root):
        for node in ast.walk(tree_of(path)):
            if not isinstance(node, ast.Call) or any(word.arg == "encoding" for word in node.keywords):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            mode = next((arg.value for arg in node.args if isinstance(arg, ast.Constant)), "")
            video = isinstance(node.func, ast.Attribute) and getattr(node.func.value, "id", "") == "av"
            text = name in ("read_text", "write_text") or (
                name == "open" and mode in ("r", "w", "a", "x") and not video
            )
            if text or (name == "open" and isinstance(node.func, ast.Name) and "b" not in str(mode)):
                found.append(f"{place(path, root, node.lineno)}: {name} without encoding")
    return found


def check_fan_out(root: Path) -> list[str]:
    """A file that imports many others has more than one purpose, or stands in the wrong room."""
    found = []
    modules = {name_of(path, root) for path in sources(root)}
    for path in sources(root):
        inside = [target for _, target, own in imports(path, root) if own]
        known = {target if target in modules else target.rpartition(".")[0] for target in inside}
        name = str(path.relative_to(root))
        if len(known) > FAN_OUT and name not in WIDER_WITH_REASON:
            found.append(f"{name} imports {len(known)} modules of the package; {FAN_OUT} are allowed")
    return found


def check_docstrings(root: Path) -> list[str]:
    """A public function of more than TOLD_FROM lines says what it takes, gives and raises."""

    def untold(body: list[ast.stmt], owner: str) -> Iterator[tuple[str, int]]:
        for node in body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                yield from untold(node.body, f"{owner}{node.name}.")
            elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                lines = (node.end_lineno or 0) - node.body[0].lineno + 1
                if lines > TOLD_FROM and ast.get_docstring(node) is None:
                    yield owner + node.name, node.lineno

    return [
        f"{place(path, root, line)}: {name} has no docstring"
        for path in sources(root)
        for name, line in untold(tree_of(path).body, "")
    ]


def public_names(path: Path) -> Iterator[str]:
    """What a module defines at its top."""
    for node in tree_of(path).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found = [node.name]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found = [target.id for target in targets if isinstance(target, ast.Name)]
        else:
            continue
        yield from (name for name in found if not name.startswith("_"))


def check_names_once(root: Path) -> list[str]:
    """A public name has one meaning in the package, or stands in TWICE_WITH_REASON.

    Not counted: what an op's implementations are called, in kernels and in the specification; a command and what does
    its work; constants that no other file imports.
    """
    where: dict[str, list[str]] = {}
    imported: set[str] = set()
    for path in sources(root):
        imported |= {target.rpartition(".")[2] for _, target, inside in imports(path, root) if inside}
        if path.parent != root / "launch" / "doors" and path != root / "launch" / "cli.py":
            for name in dict.fromkeys(public_names(path)):
                where.setdefault(name, []).append(str(path.relative_to(root)))
    return [
        f"{name} is defined in {', '.join(paths)}"
        for name, paths in where.items()
        if len(paths) > 1
        and name not in (*TWICE_WITH_REASON, *OPS, "run")
        and not (name.isupper() and name not in imported)
        and not all(path.startswith("kernels/") for path in paths)
    ]


def check_package_files(root: Path) -> list[str]:
    """An ``__init__.py`` is a docstring: a name has one address, and a part loads alone."""
    return [
        f"{path.relative_to(root)} holds more than a docstring"
        for path in sources(root)
        if path.name == "__init__.py" and (len(tree_of(path).body) != 1 or not ast.get_docstring(tree_of(path)))
    ]


def torch_free(root: Path) -> list[str]:
    """Names of the modules that must load without torch."""
    names = []
    for path in sources(root):
        name = name_of(path, root)
        title = (ast.get_docstring(tree_of(path)) or "").partition("\n")[0]
        planning = name.startswith("perf_model") and name not in NEEDS_TORCH
        if name in TORCH_FREE or planning or title.rstrip(".").endswith("(torch-free)"):
            names.append(name)
    return names


def check_torch_free(root: Path) -> list[str]:
    """Each module of ``torch_free`` loads where torch, triton and numpy are refused."""
    program = """
import importlib, importlib.util, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "triton", "numpy"):
            raise ImportError(f"planning must not import {name}")

sys.meta_path.insert(0, Refuse())
root, *names = sys.argv[1:]
spec = importlib.util.spec_from_file_location(
    "cinemesh", f"{root}/__init__.py", submodule_search_locations=[root]
)
sys.modules["cinemesh"] = importlib.util.module_from_spec(spec)
for name in names:
    try:
        importlib.import_module(f"cinemesh.{name}")
    except ImportError as error:
        print(f"{name}: {error}")
"""
    names = [name for name in torch_free(root) if name]
    done = subprocess.run([sys.executable, "-c", program, str(root), *names], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def check_shipped(root: Path) -> list[str]:
    """setup.py names every folder of the package, and every file beside its modules that they read."""
    if not (root / "setup.py").exists():
        return []
    tree = ast.parse((root / "setup.py").read_text(encoding="utf-8"))
    named = {"FOLDERS": "()", "package_data": "{}"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            named[node.targets[0].id] = ast.unparse(node.value)
        elif isinstance(node, ast.keyword) and node.arg:
            named[node.arg] = ast.unparse(node.value)
    folders, data = eval(named["FOLDERS"]), eval(named["package_data"])
    found = [str(path.relative_to(root)) for path in sources(root) if path.parent != root]
    missing = {place for place in found if place.rpartition("/")[0] not in folders}
    shipped = {
        path
        for package, patterns in data.items()
        for pattern in patterns
        for path in (root / package.removeprefix("cinemesh.").replace(".", "/")).glob(pattern)
    }
    read = [path for folder in FOLDERS for path in (root / folder).rglob("*.*") if path.suffix in READ]
    missing |= {str(path.relative_to(root)) for path in read if path not in shipped}
    return [f"{place} is not shipped: name it in setup.py" for place in sorted(missing)]


CHECKS = (
    check_imports,
    check_shipped,
    check_cycles,
    check_rooms,
    check_core_size,
    check_versions,
    check_encodings,
    check_fan_out,
    check_docstrings,
    check_names_once,
    check_collectives,
    check_readers,
    check_runtime_ignores_prices,
    check_errors,
    check_lengths,
    check_package_files,
    check_torch_free,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_house(check: Callable[[Path], list[str]]) -> None:
    """The project keeps the rule."""
    assert check(ROOT) == []


def test_something_is_checked() -> None:
    """A check that walks the wrong folder finds no fault either."""
    names = {name_of(path, ROOT) for path in sources(ROOT)}
    assert {"", "errors", "files", "memory", *FOLDERS, "launch.cli"} <= names
    assert {"errors", "launch.cli"} <= set(torch_free(ROOT))


PLANTED = [
    (check_shipped, {"model/a/b.py": "", "setup.py": f"FOLDERS = {FOLDERS}\n"}),
    (
        check_shipped,
        {
            "model/a.csv": "",
            "model/b.yaml": "",
            "setup.py": f"FOLDERS = {FOLDERS}\nsetup(package_data={{'cinemesh.model': ['*.yaml']}})\n",
        },
    ),
    (check_rooms, {"parallel/ir/a.py": "from ..passes import b\n", "parallel/passes/b.py": ""}),
    (check_rooms, {"parallel/layers/a.py": "from ..runtime import b\n", "parallel/runtime/b.py": ""}),
    (check_rooms, {"perf_model/a.py": "from ..data import clips\n"}),
    (check_core_size, {"parallel/a.py": "x = 1\n" * (CORE_LINES + 1)}),
    (
        check_fan_out,
        {"model/a.py": "".join(f"from ..kernels import k{i}\n" for i in range(FAN_OUT + 1))}
        | {f"kernels/k{i}.py": "" for i in range(FAN_OUT + 1)},
    ),
    (check_encodings, {"model/a.py": "from pathlib import Path\nx = Path('y').read_text()\n"}),
    (check_encodings, {"model/a.py": "from pathlib import Path\nPath('y').open('a')\n"}),
    (check_versions, {"model/a.py": "from importlib.metadata import version\n"}),
    (check_encodings, {"model/a.py": "open('y')\n"}),
    (check_docstrings, {"model/a.py": "def f() -> None:\n" + "    x = 1\n" * (TOLD_FROM + 1)}),
    (check_docstrings, {"model/a.py": "class A:\n    def f(self) -> None:\n" + "        x = 1\n" * (TOLD_FROM + 1)}),
    (check_names_once, {"parallel/a.py": "class Twice: ...\n", "model/b.py": "class Twice: ...\n"}),
    (check_imports, {"kernels/a.py": "from ..parallel import plan\n"}),
    (check_imports, {"model/a.py": "def f():\n    from ..launch.train import run\n"}),
    (check_imports, {"kernels/a.py": "from .. import model\n"}),
    (check_imports, {"model/a.py": "import parallel\n"}),
    (check_imports, {"model/a.py": "from parallel.plan import Plan\n"}),
    (check_imports, {"model/a.py": "from cinemesh.parallel import plan\n"}),
    (check_imports, {"errors.py": "from .kernels import philox\n"}),
    (check_cycles, {"model/a.py": "from . import b\n", "model/b.py": "from .a import x\n"}),
    (check_cycles, {"model/a.py": "def f():\n    from .a import x\n"}),
    (check_collectives, {"parallel/a.py": "import torch\ntorch.distributed.all_reduce(x)\n"}),
    (check_collectives, {"launch/a.py": "import torch.distributed as d\nd.barrier()\n"}),
    (check_collectives, {"launch/a.py": "from torch import distributed\ndistributed.send(x)\n"}),
    (check_collectives, {"model/a.py": "from torch.distributed import all_gather_into_tensor\n"}),
    (check_collectives, {"model/a.py": "import torch.distributed as d\nf = d.all_to_all_single\n"}),
    (
        check_collectives,
        {"model/a.py": "import torch.distributed._functional_collectives as f\nf.all_reduce(x)\n"},
    ),
    (
        check_collectives,
        {"model/a.py": "import torch\ntorch.ops._c10d_functional.wait_tensor(x)\n"},
    ),
    (check_collectives, {"parallel/mesh.py": "def f(group):\n    group.allreduce([])\n"}),
    (check_readers, {"data/a.py": "def f(x):\n    import yaml\n"}),
    (check_readers, {"data/a.py": "from yaml import safe_load\n"}),
    (check_readers, {"data/a.py": "import json\njson.loads(x)\n"}),
    (check_runtime_ignores_prices, {"parallel/a.py": "from ..perf_model import network\n"}),
    (
        check_runtime_ignores_prices,
        {"launch/train.py": "from . import a\n", "launch/a.py": "from ..perf_model.x import y\n"},
    ),
    *(
        (check_runtime_ignores_prices, {"launch/training/resolve.py": "from ...perf_model.x import y\n", **files})
        for files in (
            {"launch/training/loop.py": "from .resolve import resolve\n"},
            {"launch/train.py": "from . import a\n", "launch/a.py": "from .training import resolve\n"},
            {
                "launch/training/loop.py": "from . import recipe\n",
                "launch/training/recipe.py": "from . import resolve\n",
            },
            {"model/a.py": "def f():\n    from ..launch.training.resolve import resolve\n"},
            {"launch/train.py": "def f():\n    from ..perf_model.search.planner import search\n"},
        )
    ),
    *(
        (check_errors, {"launch/a.py": f"try:\n    f()\nexcept E as error:\n    {line}\n"})
        for line in (
            *("if 'GB' in str(error): pass", "x = str(error).partition(';')[0]", "x = re.match('a', str(error))"),
            *("x = str(error)[:9]", "text = str(error)", "x = repr(error).split()", "x = 'a' in f'{error}'"),
            *("x = error.args[0]", "x = f'{error}'.upper()", "x = re.sub('a', '', f'{error}')"),
        )
    ),
    (check_errors, {"kernels/a.py": "raise CinemeshError('it is 0; raise it')\n"}),
    (check_errors, {"kernels/a.py": "raise CinemeshError(f'it is {x}; raise it', remedy=y)\n"}),
    (check_lengths, {"model/a.py": "\n" * (LONGEST_FILE + 1)}),
    (check_package_files, {"model/__init__.py": '"""Model."""\nfrom . import a\n'}),
    (check_package_files, {"model/__init__.py": ""}),
    (check_torch_free, {"parallel/ir/plan.py": "import torch\n"}),
    (
        check_torch_free,
        {"parallel/ir/plan.py": "from ...model import a\n", "model/a.py": "import torch"},
    ),
    (check_torch_free, {"perf_model/a.py": "import torch.fx\n"}),
    (check_torch_free, {"kernels/a.py": '"""Rates (torch-free)."""\nimport triton\n'}),
]


@pytest.mark.parametrize(("check", "files"), PLANTED)
def test_check_finds_planted_fault(check: Callable[[Path], list[str]], files: dict[str, str], tmp_path: Path) -> None:
    """Without this, a check that matches nothing would pass for ever."""
    plant(tmp_path, {})
    assert check(tmp_path) == []
    plant(tmp_path, files)
    assert len(check(tmp_path)) == 1


LEGAL = {
    "documents.py": 'import json\n\nimport yaml\njson.loads("1")\n',
    "data/b.py": "import json\njson.dumps(x)\n",
    "parallel/runtime/comm.py": "import torch.distributed as dist\ndist.all_reduce(x)\n",
    "parallel/mesh.py": "import torch.distributed as dist\ndist.new_group([0])\n",
    "launch/checkpoint.py": "import torch.distributed.checkpoint as dcp\ndcp.save({})\n",
    "kernels/a.py": "import torch\nx.scatter(0, i, y).gather(0, i)\ntorch.scatter_reduce(x)\n",
    "perf_model/report/report.py": "import torch\nfrom ...parallel.ir import plan\n",
    "launch/a.py": "try:\n    f()\nexcept E as error:\n    raise CinemeshError(f'no: {error}', remedy='a; b')\n",
    "launch/b.py": "try:\n    f()\nexcept E as error:\n    print(str(error), error.remedy == 'a')\n",
    "launch/plans.py": "from ..perf_model import report\n",
    "launch/train.py": "def f():\n    from .training.resolve import resolve\n",
    "launch/training/resolve.py": "from ...perf_model.search.planner import search\n",
    "parallel/ir/plan.py": "from ...errors import CinemeshError\n",
    "errors.py": "class CinemeshError(Exception): ...\n",
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_check_lets_the_legal_pass(check: Callable[[Path], list[str]], tmp_path: Path) -> None:
    """A check that refuses what the house allows would soon be switched off."""
    plant(tmp_path, LEGAL)
    assert check(tmp_path) == []


def plant(root: Path, files: dict[str, str]) -> None:
    """A small package at ``root``, with ``files`` in it."""
    packages = {f"{folder}/__init__.py": '"""Folder."""\n' for folder in FOLDERS}
    for name, text in ({"__init__.py": '"""Root."""\n'} | packages | files).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


TOOLS = {
    "ruff check": ("ruff", "check", "--no-cache"),
    "ruff format": ("ruff", "format", "--check", "--no-cache"),
}
TIDY = '"""One."""\n\nx = 1\n'
UNTYPED = "\n\ndef f(x):\n    return x\n"
WIDE = f"\n\ndef f({', '.join(f'x{i}: int' for i in range(9))}) -> None: ...\n"  # nine parameters
TANGLED = (
    "\n\ndef f(x: int) -> int:\n" + "".join(f"    if x == {i}:\n        x += 1\n" for i in range(20)) + "    return x\n"
)


def judge(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """What a tool of this environment says."""
    return subprocess.run([sys.executable, "-m", *command], cwd=cwd, capture_output=True, text=True)


@pytest.mark.parametrize("tool", TOOLS.values(), ids=TOOLS)
def test_ruff_is_content(tool: tuple[str, ...]) -> None:
    paths = [*FOLDERS, "configs", "tests", "setup.py", *(f"{name}.py" for name in ROOT_MODULES)]
    done = judge(*tool, *paths, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("tool", "fault"),
    [*(("ruff check", TIDY + fault) for fault in (UNTYPED, WIDE, TANGLED)), ("ruff format", TIDY + "y = 'a'\n")],
)
def test_ruff_finds_planted_fault(tool: str, fault: str, tmp_path: Path) -> None:
    """A configuration that is not read, or selects nothing, is content with everything."""
    for text, code in ((TIDY, 0), (fault, 1)):
        (tmp_path / "a.py").write_text(text)
        done = judge(*TOOLS[tool], "--config", str(ROOT / "pyproject.toml"), "a.py", cwd=tmp_path)
        assert done.returncode == code, done.stdout + done.stderr


@pytest.mark.slow
def test_types_hold() -> None:
    link = ROOT / ".venv" / "typing" / "cinemesh"
    assert link.resolve() == ROOT.resolve(), f"{link} is missing; ./run makes it"
    done = judge("basedpyright", cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_type_checker_finds_planted_fault(tmp_path: Path) -> None:
    """With the project's own configuration, in a folder that it names."""
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    (tmp_path / ".venv").symlink_to(sys.prefix)
    for name in ROOT_MODULES:
        (tmp_path / f"{name}.py").touch()
    (tmp_path / "tests").mkdir()
    plant(tmp_path, {"model/a.py": "x: int = 1\n"})
    assert judge("basedpyright", cwd=tmp_path).returncode == 0
    plant(tmp_path, {"model/a.py": 'x: int = "1"\n'})
    done = judge("basedpyright", cwd=tmp_path)
    assert done.returncode == 1
    assert "model/a.py:1:10" in done.stdout
