"""Versions that belong together, extras, drivers."""

import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence

from packaging.requirements import Requirement

from launch.doctor_parts.findings import Finding, ok

OUR_PACKAGE = "tlite_jax"
SHOWN = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")
# NVIDIA, CUDA compatibility: the oldest Linux drivers that run programs of a major version.
OLDEST_DRIVER = {12: 525, 13: 580}


def check_versions() -> list[Finding]:
    """Python, and every requirement of ours that is absent or of another version; jax and its parts."""
    shown = ", ".join(f"{name} {version(name) or 'absent'}" for name in SHOWN)
    findings = [ok("versions", f"python {platform.python_version()}, {shown}")]
    findings += unmet(importlib.metadata.requires(OUR_PACKAGE) or ())
    return findings + mismatched({name: version(name) for name in JAX_PARTS})


def unmet(requirements: Iterable[str]) -> list[Finding]:
    """The requirements, extras aside, that are not met."""
    findings = []
    for requirement in map(Requirement, requirements):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = version(requirement.name)
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            message = f"{requirement.name} {found or 'is absent'}, needed: {requirement.specifier or 'any version'}"
            findings.append(Finding("versions", "fail", message, f"pip install '{requirement}'"))
    return findings


JAX_PARTS = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda12-pjrt", "jax-cuda13-plugin", "jax-cuda13-pjrt")


def mismatched(versions: Mapping[str, str | None]) -> list[Finding]:
    """Parts of jax that are of another version than jaxlib; they are released together."""
    wanted = versions["jaxlib"]
    wrong = [name for name, found in versions.items() if found is not None and found != wanted]
    if not wrong:
        return []
    said = ", ".join(f"{name} {versions[name]}" for name in wrong)
    mend = "pip install " + " ".join(f"{name}=={versions['jax']}" for name, found in versions.items() if found)
    return [Finding("versions", "fail", f"jaxlib {wanted}, but {said}", mend)]


def check_extras() -> list[Finding]:
    """The extras that are not installed, for what needs them."""
    extras = importlib.metadata.metadata(OUR_PACKAGE).get_all("Provides-Extra") or ()
    absent = [extra for extra in extras if any(version(name) is None for name in _of_extra(OUR_PACKAGE, extra))]
    if not absent:
        return [ok("extras", "all installed")]
    return [
        ok("extras", f"not installed: {', '.join(absent)} (pip install '{OUR_PACKAGE}[NAME]' where a command asks)")
    ]


def _of_extra(package: str, extra: str) -> Iterator[str]:
    """The distributions that an extra adds, those of extras that it names in turn included."""
    for requirement in map(Requirement, importlib.metadata.requires(package) or ()):
        marker = requirement.marker
        if marker is None or marker.evaluate({"extra": ""}) or not marker.evaluate({"extra": extra}):
            continue
        yield requirement.name
        if version(requirement.name) is not None:
            for inner in requirement.extras:
                yield from _of_extra(requirement.name, inner)


def check_driver() -> list[Finding]:
    """The NVIDIA driver against jax's CUDA plugin and NCCL; nothing where there is no GPU."""
    gpus = nvidia_smi("name,driver_version,memory.total")
    plugins = [major for major in OLDEST_DRIVER if version(f"jax-cuda{major}-plugin") is not None]
    if not gpus:
        return [ok("driver", "no NVIDIA GPU here" + (f" (jax's CUDA {plugins[0]} plugin is)" if plugins else ""))]
    name, driver, memory = gpus[0]
    found = [ok("driver", f"{len(gpus)} x {name}, {memory}, driver {driver}, NCCL {nccl() or 'absent'}")]
    return [*found, *driver_problems(driver, plugins, nccl(), os.environ)]


def driver_problems(
    driver: str, plugins: Sequence[int], nccl_version: str | None, environment: Mapping[str, str]
) -> list[Finding]:
    """What would keep jax from a machine's GPUs."""
    if not plugins:
        mend = "pip install 'tlite_jax[cuda13]', or [cuda12] with drivers older than 580"
        return [Finding("driver", "fail", "NVIDIA GPUs are here, and jax has no CUDA plugin", mend)]
    findings = []
    major = int(found[0]) if (found := re.match(r"\d+", driver)) else 0
    for plugin in plugins:
        if major < OLDEST_DRIVER[plugin]:
            message = f"driver {driver} cannot run CUDA {plugin}, which needs {OLDEST_DRIVER[plugin]} or later"
            older = "use the extra cuda12" if plugin == 13 and major >= OLDEST_DRIVER[12] else "update the driver"
            findings.append(Finding("driver", "fail", message, older))
    if nccl_version is None:
        mend = f"pip install 'tlite_jax[cuda{plugins[0]}]'"
        findings.append(Finding("driver", "fail", "NCCL is absent: several GPUs cannot work together", mend))
    if re.search(r"cuda|nccl|cudnn", environment.get("LD_LIBRARY_PATH", ""), re.I):
        message = "LD_LIBRARY_PATH has CUDA's libraries, which go before those that jax was installed with"
        findings.append(Finding("driver", "warn", message, "unset LD_LIBRARY_PATH, or remove them from it"))
    return findings


def nvidia_smi(fields: str) -> list[list[str]]:
    """One row a GPU; none where there is no driver."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        printed = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [[field.strip() for field in line.split(",")] for line in printed.splitlines() if line.strip()]


def nccl() -> str | None:
    """The version of NCCL's wheel."""
    return version("nvidia-nccl-cu13") or version("nvidia-nccl-cu12")


def version(name: str) -> str | None:
    """Of an installed distribution."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
