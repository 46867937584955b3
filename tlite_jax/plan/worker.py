"""Compiling in a process of its own, which a compiler may end, and whose environment is set before jax is imported.

    python -m tlite_jax.plan.worker < request.json

reads one request and writes one JSON line per variant, {"program": ...} or {"error": {"message": ...}}, in their order.
`compile_variants` is the other side: it starts that process and reads the lines.
"""

import contextlib
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from tlite_jax.config import RunConfig, Section
from tlite_jax.config_files import override, parse
from tlite_jax.errors import UserError
from tlite_jax.plan.program import Program
from tlite_jax.plan.topology import Hardware, devices, domain

# None of the described devices is here. libtpu must not look for a TPU, nor lock one; compilers' logs are no news.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}
# kind -> (any of these modules is enough, every one of these too, extra of setup.cfg, what it is)
_PLUGINS = {
    "nvidia": (("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13"), ("nvidia.cudnn",), "plan-gpu", "NVIDIA GPUs"),
    "tpu": (("libtpu",), (), "plan-tpu", "TPUs"),
}

Compile = Callable[..., Program]


class Request(Section):
    """What to compile: variants of one config on one cluster, each a list of `section.field=value` words."""

    config: RunConfig
    hardware: Hardware
    nodes: int
    variants: tuple[tuple[str, ...], ...]
    on_cpu: bool = False


@dataclass(frozen=True)
class Failure:
    """A variant that did not compile, in one line.

    Attributes:
      message: why.
      is_mistake: of the user, whom the message tells what to do.
      is_memory: the compiler found it too large for the device; those for GPUs do not look.
    """

    message: str
    is_mistake: bool = False
    is_memory: bool = False


def plugin_is_missing(hardware: Hardware) -> str | None:
    """A sentence that names the extra to install, or None when all that compiling for `hardware` takes is there."""
    if hardware.kind not in _PLUGINS:
        return None
    either, every, extra, what = _PLUGINS[hardware.kind]
    if any(_found(module) for module in either) and all(_found(module) for module in every):
        return None
    return f"compiling for {what} needs their compiler: pip install 'tlite_jax[{extra}]'"


def compile_variants(request: Request) -> Generator[Program | Failure, None, None]:
    """Compiles each variant in another process, which is started again after a variant that ends it.

    Closing the generator ends the process.
    """
    done = 0
    while done < len(request.variants):
        rest = request.model_copy(update={"variants": request.variants[done:]})
        for answer in _one_process(rest):
            done += 1
            yield answer


def inherited() -> dict[str, str]:
    """The environment of this process, in which another one finds this package."""
    package = str(Path(__file__).resolve().parent.parent.parent)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))}


def _one_process(request: Request) -> Iterator[Program | Failure]:
    """Answers until the process ends; at least one."""
    num_devices = request.nodes * request.hardware.devices_per_node if _is_cpu(request) else 1
    environment = {**inherited(), **ENVIRONMENT, "JAX_NUM_CPU_DEVICES": str(num_devices)}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        command = [sys.executable, "-m", "tlite_jax.plan.worker"]
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
        try:
            yield from _answers(process, request, log)
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


def _answers(process: subprocess.Popen[str], request: Request, log: IO[str]) -> Iterator[Program | Failure]:
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(request.model_dump_json())
        process.stdin.close()
    answered = 0
    for line in process.stdout:
        answer = json.loads(line)
        yield Program.from_json(answer["program"]) if "program" in answer else Failure(**answer["error"])
        answered += 1
    if unanswered := len(request.variants) - answered:
        status = process.wait()
        # A signal is the compiler's work on this variant; a status is ours on all of them.
        yield from [Failure(_why_it_ended(status, log))] * (1 if status < 0 else unanswered)


def _why_it_ended(status: int, log: IO[str]) -> str:
    log.seek(0)
    lines = [line.strip() for line in log if line.strip()]
    # An abort is explained in a line of severity F; a Python error in the last one.
    fatal = [line for line in lines if line.startswith("F0") or "Check failed" in line]
    last = (fatal or lines[-1:] or [""])[0][:300]
    how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
    return f"the compiler's process ended {how}{': ' if last else ''}{last}"


def _is_cpu(request: Request) -> bool:
    return request.on_cpu or request.hardware.kind == "cpu"


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a parent package
        return False


def serve(request: Request, compile_program: Compile, write: Callable[[dict[str, Any]], None]) -> None:
    """Compiles every variant and writes an answer for each; what goes wrong with one is its answer."""
    cluster = devices(request.hardware, request.nodes, on_cpu=request.on_cpu)
    per_domain = domain(request.hardware, request.nodes).devices_per_domain
    for words in request.variants:
        try:
            config = override(request.config, words)
            program = compile_program(config, cluster, devices_per_node=per_domain)
        except Exception as error:
            write({"error": asdict(_failure(error))})
        else:
            write({"program": program.to_json()})


def _failure(error: Exception) -> Failure:
    lines = str(error).strip().splitlines() or [""]
    if isinstance(error, UserError):
        return Failure(lines[0], is_mistake=True)
    is_memory = "RESOURCE_EXHAUSTED" in lines[0] or "Ran out of memory" in str(error)
    # libtpu says in a later line how much it would have used, and of what.
    telling = next((line.strip() for line in lines if is_memory and "Used " in line), lines[0])
    return Failure(f"{type(error).__name__}: {telling}", is_memory=is_memory)


def main() -> None:
    """Serves the request on stdin; whatever else prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    request = parse(Request, json.load(sys.stdin), origin="request")

    def write(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    serve(request, importlib.import_module("tlite_jax.plan.compile").compile_program, write)


if __name__ == "__main__":
    main()
