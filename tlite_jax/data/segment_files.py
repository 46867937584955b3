"""A run's timeline on disk.

RUN/plans/HASH.json    every plan that it has read or will read
RUN/segments.json      its segments, those declared for later included
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tlite_jax.data.files import read_json, write_json, write_text
from tlite_jax.data.order import Plan
from tlite_jax.data.segments import Segment, Timeline
from tlite_jax.errors import UserError

SEGMENTS_FILE = "segments.json"


@dataclass(frozen=True)
class Rewind:
    """A rewind that has been declared but whose checkpoints are not all set aside yet.

    Attributes:
      to: the step asked for.
      skip: first and last step skipped, if any.
      directory: where the checkpoints go.
      automatic: whether the run itself has declared it; it then finishes it itself.
    """

    to: int
    skip: tuple[int, int] | None
    directory: str
    automatic: bool = False

    @property
    def words(self) -> str:
        """The options of the command."""
        return f"--to {self.to}" + (f" --skip {self.skip[0]}..{self.skip[1]}" if self.skip else "")


def write_timeline(run: Path, timeline: Timeline, rewind: Rewind | None = None) -> None:
    """Writes the plans, then the segments that name them, and a rewind that is under way."""
    (run / "plans").mkdir(parents=True, exist_ok=True)
    for plan in timeline.plans.values():
        write_text(run / "plans" / f"{plan.hash}.json", plan.to_json())
    values = {"segments": [asdict(segment) for segment in timeline.segments]}
    write_json(run / SEGMENTS_FILE, {**values, "rewind": rewind and asdict(rewind)})


def read_timeline(run: Path, recorded: Sequence[Segment]) -> Timeline:
    """Reads a run's timeline.

    Args:
      run: its directory.
      recorded: the segments that its checkpoint records, used where there is no segments.json.

    Raises:
      UserError: a plan that is missing or damaged, a damaged segments.json, or a rewind under way.
    """
    segments, rewind = read_segments(run)
    if rewind is not None:
        again = f"`python -m launch rewind {run} {rewind.words}`"
        raise UserError(f"a rewind of {run} was interrupted; finish it with {again}")
    return timeline_of(run, segments or recorded)


def read_segments(run: Path) -> tuple[tuple[Segment, ...], Rewind | None]:
    """The segments that a run declares, none without a segments.json, and the rewind under way, if one is."""
    if not (run / SEGMENTS_FILE).exists():
        return (), None
    try:
        values = read_json(run / SEGMENTS_FILE)
        segments = tuple(Segment(**segment) for segment in values["segments"])
        rewind = values["rewind"]
        skip = tuple(rewind["skip"]) if rewind and rewind["skip"] else None
        if not rewind:
            return segments, None
        return segments, Rewind(rewind["to"], skip, rewind["directory"], rewind.get("automatic", False))
    except (UserError, KeyError, TypeError) as error:
        mend = "delete it to go on with the segments that the checkpoint records"
        raise UserError(f"{run / SEGMENTS_FILE} is damaged; {mend}") from error


def timeline_of(run: Path, segments: Sequence[Segment]) -> Timeline:
    """Puts segments and the plans that they name together.

    Raises:
      UserError: a plan that is missing or damaged.
    """
    plans = {}
    for name in dict.fromkeys(segment.plan_hash for segment in segments):
        file = run / "plans" / f"{name}.json"
        try:
            plans[name] = Plan.from_json(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"cannot read {file}, a plan that this run has used: {error.strerror}") from error
        except UserError as error:
            raise UserError(f"{file}: {error}; restore it") from error
    return Timeline(tuple(segments), plans)
