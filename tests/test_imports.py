"""The arrows of the house, read from the imports: who may know whom, and no cycles."""

import ast
import functools
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

# module or package -> what of ours it may import besides itself
ARROWS = {
    "tlite_jax.errors": [],
    "tlite_jax.config": [],
    "tlite_jax.config_files": ["tlite_jax.config", "tlite_jax.errors"],
    "tlite_jax.model": ["tlite_jax.config", "tlite_jax.errors"],
    "tlite_jax.zeros": [],
    "tlite_jax.loss": ["tlite_jax.config", "tlite_jax.model", "tlite_jax.zeros"],
    "tlite_jax.optimizer": ["tlite_jax.config"],
    "tlite_jax.sharding": ["tlite_jax.config", "tlite_jax.errors"],
    "tlite_jax.verification": [],
    "tlite_jax.data": [
        "tlite_jax.config",
        "tlite_jax.config_files",
        "tlite_jax.errors",
        "tlite_jax.verification",
    ],
    "tlite_jax.bridge": [
        "tlite_jax.config",
        "tlite_jax.config_files",
        "tlite_jax.errors",
        "tlite_jax.model",
        "tlite_jax.verification",
    ],
    "tlite_jax.telemetry": ["tlite_jax.config", "tlite_jax.errors"],
    # It reads a run's files, and needs no jax to do so.
    "tlite_jax.report": [
        "tlite_jax.config",
        "tlite_jax.config_files",
        "tlite_jax.errors",
        "tlite_jax.data.segment_files",
        "tlite_jax.data.segments",
        "tlite_jax.telemetry",
    ],
    "tlite_jax.generate": ["tlite_jax.config", "tlite_jax.errors", "tlite_jax.model", "tlite_jax.sharding"],
    "tlite_jax.best": [],
    # The base that a run is compared with is a checkpoint; what is measured of it is written as metrics are.
    "tlite_jax.evaluate": [
        "tlite_jax.best",
        "tlite_jax.checkpoint",
        "tlite_jax.config",
        "tlite_jax.errors",
        "tlite_jax.data.buckets",
        "tlite_jax.generate",
        "tlite_jax.loss",
        "tlite_jax.model",
        "tlite_jax.sharding",
        "tlite_jax.telemetry",
    ],
    "tlite_jax.train.state": ["tlite_jax.config", "tlite_jax.model", "tlite_jax.optimizer", "tlite_jax.sharding"],
    "tlite_jax.train.context": ["tlite_jax.config", "tlite_jax.errors", "tlite_jax.model", "tlite_jax.sharding"],
    "tlite_jax.train.layers": ["tlite_jax.config", "tlite_jax.model", "tlite_jax.sharding", "tlite_jax.zeros"],
    "tlite_jax.train.gradients": [
        "tlite_jax.config",
        "tlite_jax.loss",
        "tlite_jax.model",
        "tlite_jax.sharding",
        "tlite_jax.train.context",
        "tlite_jax.train.layers",
        "tlite_jax.zeros",
    ],
    "tlite_jax.train.compile_options": ["tlite_jax.config", "tlite_jax.model", "tlite_jax.sharding"],
    "tlite_jax.train.step": [
        "tlite_jax.config",
        "tlite_jax.errors",
        "tlite_jax.model",
        "tlite_jax.optimizer",
        "tlite_jax.sharding",
        "tlite_jax.train.compile_options",
        "tlite_jax.train.context",
        "tlite_jax.train.gradients",
        "tlite_jax.train.norms",
        "tlite_jax.train.state",
    ],
    "tlite_jax.train.norms": ["tlite_jax.config", "tlite_jax.model", "tlite_jax.sharding"],
    "tlite_jax.train.bucket_losses": ["tlite_jax.data.segments"],
    # It compiles the very step that training runs.
    "tlite_jax.plan": [
        "tlite_jax.config",
        "tlite_jax.config_files",
        "tlite_jax.errors",
        "tlite_jax.model",
        "tlite_jax.optimizer",
        "tlite_jax.sharding",
        "tlite_jax.telemetry.throughput",
        "tlite_jax.train.context",
        "tlite_jax.train.state",
        "tlite_jax.train.step",
    ],
    "tlite_jax.coordinator": [],
    # It names the order of the data by its segments, and reads no data.
    "tlite_jax.checkpoint": [
        "tlite_jax.best",
        "tlite_jax.config",
        "tlite_jax.config_files",
        "tlite_jax.coordinator",
        "tlite_jax.data.files",
        "tlite_jax.data.segments",
        "tlite_jax.errors",
        "tlite_jax.model",
        "tlite_jax.optimizer",
        "tlite_jax.sharding",
        "tlite_jax.train.state",
        "tlite_jax.verification",
    ],
    # It opens what is released as whoever gets it would, and measures it as training measures itself.
    "tlite_jax.release": [
        "tlite_jax.bridge",
        "tlite_jax.checkpoint",
        "tlite_jax.config",
        "tlite_jax.config_files",
        "tlite_jax.errors",
        "tlite_jax.evaluate",
        "tlite_jax.generate",
        "tlite_jax.model",
        "tlite_jax.report.read",
        "tlite_jax.sharding",
        "tlite_jax.telemetry",
        "tlite_jax.verification",
    ],
    # It compares files, and leaves the work to commands.
    "tlite_jax.recipe": [
        "tlite_jax.config",
        "tlite_jax.config_files",
        "tlite_jax.errors",
        "tlite_jax.report.read",
    ],
    "tlite_jax.train.lock": ["tlite_jax.errors"],
    "tlite_jax.train.directory": ["tlite_jax.config", "tlite_jax.data.segments", "tlite_jax.errors"],
    "tlite_jax.train.run": ["tlite_jax"],
    "tlite_jax.train.rewind": ["tlite_jax"],
    "tlite_jax.train.anomalies": ["tlite_jax"],
    "tlite_jax.train.spike_detector": ["tlite_jax.config"],
    "tlite_jax.train.spikes": ["tlite_jax"],
    "tlite_jax.train.digest": ["tlite_jax.sharding"],
    "tlite_jax.train.corruption": ["tlite_jax"],
    "tlite_jax.train.spike_rewind": ["tlite_jax"],
    "tlite_jax.train.log": ["tlite_jax"],
    "tlite_jax.train.loop": ["tlite_jax"],
}
# Rooms that `tlite_jax.train.run` and `loop`, which may know most others, have no business with.
NOT_FOR_TRAINING = [
    "tlite_jax.bridge",
    "tlite_jax.generate",
    "tlite_jax.evaluate",
    "tlite_jax.plan",
    "tlite_jax.data.prepare",
]
OUR_PACKAGES = {"tlite_jax", "launch", "tests", "configs", "bench"}
JAX = {"jax", "jaxlib", "flax", "optax", "orbax"}


def name_of(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources(package: str) -> dict[str, Path]:
    """Module name -> file."""
    return {name_of(path): path for path in sorted((REPOSITORY / package).rglob("*.py"))}


OURS = {**sources("tlite_jax"), **sources("launch")}


@functools.cache
def imports(module: str) -> frozenset[str]:
    """Every module that a file imports, anywhere in it; of ours, the module that a name comes from."""
    found = set()
    for node in ast.walk(ast.parse(OURS[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            assert node.module is not None
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            submodules = names & OURS.keys()
            found |= submodules
            if len(submodules) < len(names):
                found.add(node.module)
    return frozenset(found - {"tlite_jax"})  # the package itself holds its version


@functools.cache
def reached(module: str) -> frozenset[str]:
    """What is loaded with a module: its imports at the top level and theirs."""
    return frozenset().union(*({found} | (reached(found) if found in OURS else set()) for found in imports(module)))


def within(module: str, room: str) -> bool:
    return module == room or module.startswith(f"{room}.")


def of_room(room: str) -> list[str]:
    return [module for module in OURS if within(module, room)]


@pytest.mark.parametrize("room", ARROWS)
def test_a_room_knows_only_what_its_arrows_allow(room: str) -> None:
    modules = of_room(room)
    assert modules, f"{room} is gone: mend the arrows here"
    for module in modules:
        ours = {
            found for found in imports(module) if found.split(".")[0] in ("tlite_jax", "launch", "tests", "configs")
        }
        wrong = {found for found in ours if not any(within(found, allowed) for allowed in [room, *ARROWS[room]])}
        assert not wrong, f"{module} may not import {', '.join(sorted(wrong))}"


def test_every_module_has_its_arrows() -> None:
    rooms = [*ARROWS, "launch"]
    empty = {"tlite_jax", "tlite_jax.train"}
    lost = [module for module in OURS if module not in empty and not any(within(module, room) for room in rooms)]
    assert not lost, f"say in this file what {', '.join(lost)} may import"


def test_the_package_never_imports_what_is_built_on_it() -> None:
    for module in of_room("tlite_jax"):
        above = {found for found in imports(module) if found.split(".")[0] in ("launch", "tests", "configs", "bench")}
        assert not above, f"{module} imports {', '.join(above)}"
    for module in of_room("launch"):
        assert not {found for found in imports(module) if found.split(".")[0] in ("tests", "bench")}, module


@pytest.mark.parametrize("module", ["tlite_jax.train.run", "tlite_jax.train.loop"])
def test_training_knows_no_other_rooms_work(module: str) -> None:
    wrong = {found for found in imports(module) if any(within(found, room) for room in NOT_FOR_TRAINING)}
    assert not wrong
    assert "tlite_jax.train.loop" not in imports("tlite_jax.train.run")


def test_the_model_never_hears_of_a_mesh() -> None:
    for module in [*of_room("tlite_jax.model"), "tlite_jax.loss"]:
        assert "tlite_jax.sharding" not in reached(module), module
        assert "jax.sharding" not in imports(module), module


def test_data_and_config_work_without_jax() -> None:
    """Preparing runs on machines and in processes that have no business with accelerators."""
    free = [*of_room("tlite_jax.data"), "tlite_jax.config", "tlite_jax.config_files", "tlite_jax.errors"]
    for module in free:
        if module != "tlite_jax.data.loader":
            found = {name for name in reached(module) if name.split(".")[0] in JAX}
            assert not found, f"{module} reaches {', '.join(sorted(found))}"
    assert "jax" in imports("tlite_jax.data.loader")


def test_there_are_no_cycles() -> None:
    for package in ("tlite_jax", "launch"):
        done: set[str] = set()

        def visit(module: str, path: tuple[str, ...], done: set[str] = done) -> None:
            assert module not in path, f"cycle: {' -> '.join([*path, module])}"
            if module in OURS and module not in done:
                for found in sorted(imports(module)):
                    visit(found, (*path, module))
                done.add(module)

        for module in of_room(package):
            visit(module, ())


def test_commands_import_what_is_heavy_only_when_they_run() -> None:
    """`--help` should not wait for jax."""
    for module in of_room("launch"):
        tree = ast.parse(OURS[module].read_text(encoding="utf-8"))
        top = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
        top |= {str(node.module) for node in tree.body if isinstance(node, ast.ImportFrom)}
        heavy = {name for name in top if name.split(".")[0] in {*JAX, "torch", "transformers", "matplotlib"}}
        ours = {name for name in top if name in OURS and {r.split(".")[0] for r in reached(name)} & JAX}
        assert not heavy | ours, f"{module} imports {', '.join(sorted(heavy | ours))} at its top"
