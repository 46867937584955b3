"""The exceptions a user is meant to read."""

import importlib
from types import ModuleType


class UserError(ValueError):
    """Something the user can mend: one line that says what is wrong and what to do about it.

    The command line prints it without a trace and exits with status 2.
    """


class SpikesError(RuntimeError):
    """The loss has spiked again after as many automatic rewinds as a run may make; the command ends with status 77."""

    exit_status = 77


class CorruptionError(RuntimeError):
    """A device computes or holds other bits than it should; the command ends with status 78."""

    exit_status = 78


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Imports an optional dependency, or says in one line which extra provides it.

    Args:
      module: importable name, e.g. "torch".
      extra: the extra of setup.cfg that installs it.
      purpose: what it is needed for, as the subject of the sentence.

    Raises:
      UserError: when the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{purpose} needs {module!r}: pip install 'tlite_jax[{extra}]'") from error
