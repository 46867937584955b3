"""The tasks of MERA 1.1.0: shots, prompts, what is asked of the model and how it is scored.

Source: github.com/ai-forever/MERA, `lm-evaluation-harness/lm_eval/tasks` and `modules/scoring`, as of July 2024. The
order of the table is that of its submission script.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tlite_jax.errors import UserError

VERSIONS = ("1.1.0",)
REPOSITORY = "ai-forever/MERA"

Kind = Literal["choice", "text", "dialogue", "code"]
Split = Literal["test", "labelled", "validation"]

_LETTERS = ("A", "B", "C", "D")
_DIGITS = tuple("0123456789")
_OPTIONS = "{text}\nA) {option_a}\nB) {option_b}\nC) {option_c}\nD) {option_d}\nОтвет:"
_QUESTION_OPTIONS = _OPTIONS.replace("{text}", "{question}")
_ANSWER = "\nОтвет:"


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
      name: as in the submission; the dataset's folder is the same in lower case.
      shots: worked examples before the question.
      kind: "choice" compares the likelihood of fixed continuations, "text" decodes greedily up to a stop, "dialogue"
        is a choice whose context holds the model's earlier answers, "code" samples programs and runs them.
      metrics: names, in the order of the results.
      examples: split that examples come from and that has answers; None where only "test" exists.
      strip: whether white space around a filled-in instruction goes away.
      suffix: what follows a filled-in instruction.
      short: template of a question after the first example; None: the instruction again.
      choices: continuations in the order of the requests, without the space before each.
      labels: what the submission says for each choice, where that differs.
      stops: strings that end a decoded answer.
      inputs_name: name in the instruction for `inputs` that is one string.
      literal: replace the placeholder only, since instructions or inputs hold braces.
      group: field that examples must share with the question, and that results are also split by.
      in_total: whether the total score counts it.
    """

    name: str
    shots: int
    kind: Kind
    metrics: tuple[str, ...] = ("acc",)
    examples: Literal["train", "public_test"] | None = "train"
    strip: bool = True
    suffix: str = ""
    short: str | None = None
    choices: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    stops: tuple[str, ...] = ()
    inputs_name: str = "inputs"
    literal: bool = False
    group: str | None = None
    in_total: bool = True

    @property
    def folder(self) -> str:
        """Of the dataset."""
        return self.name.lower()

    @property
    def answers(self) -> tuple[str, ...]:
        """What the submission says for each choice."""
        return self.labels or self.choices


_CODE_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")

TASKS = (
    # The submission script of 1.1.0 takes the first score for "0" although the first request asks for " 1".
    Task("BPS", 2, "choice", choices=("1", "0"), labels=("0", "1"), strip=False, literal=True, short="{inputs}"),
    Task("LCS", 2, "choice", examples="public_test", choices=_DIGITS, short="{inputs}"),
    Task(
        "CheGeKa",
        4,
        "text",
        metrics=("f1", "em"),
        stops=(".",),
        short='Категория "{topic}"\nВопрос: {text}\nОтвет:',
    ),
    Task("MathLogicQA", 5, "choice", choices=_LETTERS, short=_OPTIONS),
    Task("MultiQ", 0, "text", metrics=("f1", "em"), stops=(".",)),
    Task("PARus", 0, "choice", choices=("1", "2"), strip=False, suffix=_ANSWER),
    Task("RCB", 0, "choice", ("acc", "f1_macro"), choices=("1", "2", "3"), strip=False, suffix=_ANSWER),
    Task("ruDetox", 0, "text", (), stops=("\n",), inputs_name="toxic_comment", in_total=False),
    Task(
        "ruEthics",
        0,
        "choice",
        ("mcc",),
        examples=None,
        choices=("1", "0"),
        labels=("0", "1"),
        strip=False,
        group="meta.question",
        in_total=False,
    ),
    Task(
        "ruHateSpeech",
        0,
        "choice",
        examples=None,
        choices=("1", "2"),
        strip=False,
        group="inputs.target_group",
        in_total=False,
    ),
    Task("ruHHH", 0, "choice", examples=None, choices=("1", "2"), group="meta.criteria", in_total=False),
    Task("ruMMLU", 5, "choice", examples="public_test", choices=_LETTERS, short=_OPTIONS, group="meta.domain"),
    Task("ruModAr", 0, "text", examples="public_test", stops=("\n",)),
    Task("ruMultiAr", 5, "text", stops=("\n",), short="{inputs}"),
    Task("SimpleAr", 5, "text", stops=("\n",), short="{inputs}"),
    Task("ruOpenBookQA", 5, "choice", ("acc", "f1_macro"), choices=_LETTERS, short=_QUESTION_OPTIONS),
    Task("ruWorldTree", 5, "choice", ("acc", "f1_macro"), choices=_LETTERS, short=_QUESTION_OPTIONS),
    Task("RWSD", 0, "choice", choices=("Да", "Нет"), strip=False, suffix=_ANSWER),
    Task("USE", 0, "text", ("grade_norm",), stops=(".", "\n")),
    Task("ruTiE", 0, "dialogue", choices=("1", "2"), strip=False, suffix=_ANSWER),
    Task(
        "ruHumanEval",
        0,
        "code",
        ("pass@1", "pass@5", "pass@10"),
        examples="public_test",
        strip=False,
        stops=_CODE_STOPS,
    ),
)
TOTAL_TASKS = tuple(task for task in TASKS if task.in_total)


def check_version(version: str) -> None:
    """Refuses a version that nothing here reproduces.

    Raises:
      UserError: an unknown version.
    """
    if version not in VERSIONS:
        raise UserError(f"--mera-version {version}: known is {', '.join(VERSIONS)}")


def select_tasks(names: Sequence[str] | None) -> tuple[Task, ...]:
    """The tasks of those names, in MERA's order, whatever their case; None: the 17 that the total counts.

    Raises:
      UserError: an unknown name, with those nearest to it; none at all.
    """
    if names is None:
        return TOTAL_TASKS
    by_folder = {task.folder: task for task in TASKS}
    wanted: set[str] = set()
    for name in names:
        if name == "all":
            wanted |= by_folder.keys()
            continue
        if name.lower() not in by_folder:
            near = difflib.get_close_matches(name.lower(), by_folder, n=3, cutoff=0.4)
            choices = [by_folder[folder].name for folder in near] or [task.name for task in TASKS]
            raise UserError(f"MERA has no task {name!r}; nearest: {', '.join(choices)}")
        wanted.add(name.lower())
    if not wanted:
        raise UserError("--mera-tasks names no task")
    return tuple(task for task in TASKS if task.folder in wanted)
