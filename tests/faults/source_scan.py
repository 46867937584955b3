"""What source code must not do with what comes from elsewhere: read off its syntax tree."""

import ast
from collections.abc import Iterator
from pathlib import Path

PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
# Calls by their last names, whatever the module is called.
NEVER = {
    "unsafe_load": "YAML tags run code",
    "full_load": "YAML tags make objects",
    "system": "a shell",
    "popen": "a shell",
    "getoutput": "a shell",
    "getstatusoutput": "a shell",
    "extractall": "archives may lead elsewhere",
    "mktemp": "a race",
}
SHELL_FREE_OWNERS = {"platform"}  # platform.system() is a name


def problems(source: str) -> Iterator[tuple[int, str]]:
    """Line and complaint of each thing that is not allowed."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in PICKLES:
                    yield node.lineno, f"imports {alias.name}"
        elif isinstance(node, ast.ImportFrom):
            if (node.module or "").split(".")[0] in PICKLES:
                yield node.lineno, f"imports from {node.module}"
        elif isinstance(node, ast.Call):
            yield from ((node.lineno, text) for text in _call(node))


def _call(node: ast.Call) -> Iterator[str]:
    options = {word.arg: word.value for word in node.keywords}
    name, owner = _name(node.func)
    if owner == "" and name in ("eval", "exec"):
        yield f"{name}() runs a string"
    if name in NEVER and owner not in SHELL_FREE_OWNERS:
        yield f"{name}: {NEVER[name]}"
    if "shell" in options and not _is(options["shell"], False):
        yield "shell= other than False"
    if "trust_remote_code" in options and not _is(options["trust_remote_code"], False):
        yield "trust_remote_code other than False"
    if owner == "torch" and name == "load" and not _is(options.get("weights_only"), True):
        yield "torch.load without weights_only=True"
    if owner in ("np", "numpy") and name == "load" and not _is(options.get("allow_pickle"), False):
        yield "numpy.load without allow_pickle=False"
    if owner == "yaml" and name == "load" and not _is_safe_loader(options.get("Loader")):
        yield "yaml.load with a loader that is not safe"
    if name == "from_pretrained" and owner.startswith("Auto") and "trust_remote_code" not in options:
        yield "from_pretrained without trust_remote_code=False"


def _name(function: ast.expr) -> tuple[str, str]:
    """Last name, and the name before it ("" for none)."""
    if isinstance(function, ast.Name):
        return function.id, ""
    if isinstance(function, ast.Attribute):
        owner = function.value
        return function.attr, getattr(owner, "id", getattr(owner, "attr", "?"))
    return "", ""


def _is(value: ast.expr | None, constant: bool) -> bool:
    return isinstance(value, ast.Constant) and value.value is constant


def _is_safe_loader(value: ast.expr | None) -> bool:
    """`_Loader` is ours: a subclass of yaml.SafeLoader, which a test looks at."""
    return value is not None and _name(value)[0] in ("SafeLoader", "CSafeLoader", "_Loader")


def python_files(root: Path) -> list[Path]:
    """The program and its benchmarks."""
    return sorted(path for part in ("tlite_jax", "launch", "bench") for path in (root / part).rglob("*.py"))
