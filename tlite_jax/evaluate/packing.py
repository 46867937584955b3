"""Requests for log-likelihoods laid out as rows: beginnings that several share are computed once, and rows are full.

A row holds trees of tokens in depth-first order. A token's `end` is where its subtree ends, so query t sees key s when
s <= t < end(s): its ancestors and itself, whatever else the row holds. A multiple-choice question is a tree whose
trunk is the question and whose branches are the answers; a few-shot prompt that many questions begin with is a trunk
too. What a token is given is exactly what it would be given alone.
"""

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

Tokens = Sequence[int]
LEAST_ROW, USUAL_ROW = 64, 512
LONGEST_SHARED_ROW = 4096
_SHARED_ROWS = 4  # a tree grows to this many times its longest sequence: attention computes what it masks, too


@dataclass(frozen=True)
class Scoring:
    """A request: the tokens that the model reads, and the tokens that it is scored on at the end of them.

    Attributes:
      inputs: the model's input, 1 token at least.
      targets: the token that should follow each of the last len(targets) inputs, 1 at least.
    """

    inputs: tuple[int, ...]
    targets: tuple[int, ...]


@dataclass
class Row:
    """Tokens of a row of some length, and which of its places are scored.

    Attributes:
      length: T, tokens the row has room for.
      tokens, positions, ends: up to T each.
      requests: (number of the request, its places in the row, the targets there).
      branched: whether some token is not the only child of the one before it.
    """

    length: int
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    requests: list[tuple[int, np.ndarray, tuple[int, ...]]] = field(default_factory=list)
    branched: bool = False

    @property
    def num_scored(self) -> int:
        """Scored places, over all requests."""
        return sum(len(places) for _, places, _ in self.requests)


class _Tree:
    """Sequences in lexicographic order, each sharing what it has in common with the one before it."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.ends: list[int] = []
        self.requests: list[tuple[int, np.ndarray, tuple[int, ...]]] = []
        self.branched = False
        self._path: list[int] = []

    def add(self, number: int, request: Scoring, shared: int) -> None:
        """Adds a sequence of which the first `shared` tokens are those of the sequence added last."""
        for place in self._path[shared:]:
            self.ends[place] = len(self.tokens)
        self.branched = self.branched or (bool(self.tokens) and len(self._path) > shared)
        first, new = len(self.tokens), len(request.inputs) - shared
        self._path = self._path[:shared] + list(range(first, first + new))
        self.tokens += request.inputs[shared:]
        self.positions += range(shared, shared + new)
        self.ends += [0] * new
        places = np.array(self._path[len(request.inputs) - len(request.targets) :], np.int32)
        self.requests.append((number, places, request.targets))

    def close(self) -> None:
        """Ends what is open."""
        for place in self._path:
            self.ends[place] = len(self.tokens)


def pack(requests: Sequence[Scoring]) -> list[Row]:
    """Lays requests out in rows, longest rows first; every request is in exactly one."""
    rows: list[Row] = []
    rooms: list[tuple[int, int]] = []  # (room, row), ascending
    trees = sorted(_trees(requests), key=lambda tree: -len(tree.tokens))
    # Few tokens in all need no row of the usual length.
    least = min(USUAL_ROW, row_length(sum(len(tree.tokens) for tree in trees)))
    for tree in trees:
        size = len(tree.tokens)
        best = bisect.bisect_left(rooms, (size, 0))
        if best < len(rooms):
            _, number = rooms.pop(best)
        else:
            number = len(rows)
            rows.append(Row(max(least, row_length(size))))
        _place(tree, rows[number])
        bisect.insort(rooms, (rows[number].length - len(rows[number].tokens), number))
    return sorted(rows, key=lambda row: (-row.length, -row.num_scored))


def row_length(size: int) -> int:
    """The length of row that a tree is given: powers of two and one and a half times them, few enough to compile."""
    length = LEAST_ROW
    while length < size:
        length = length * 3 // 2 if length * 3 // 2 >= size and length & (length - 1) == 0 else _next_power(length)
    return length


def _next_power(length: int) -> int:
    return 1 << length.bit_length()


def _place(tree: _Tree, row: Row) -> None:
    base = len(row.tokens)
    row.tokens += tree.tokens
    row.positions += tree.positions
    row.ends += [base + end for end in tree.ends]
    row.segments += [row.segments[-1] + 1 if row.segments else 1] * len(tree.tokens)
    row.requests += [(number, base + places, targets) for number, places, targets in tree.requests]
    row.branched = row.branched or tree.branched


def _trees(requests: Sequence[Scoring]) -> Iterable[_Tree]:
    order = sorted(range(len(requests)), key=lambda number: requests[number].inputs)
    longest = max((len(request.inputs) for request in requests), default=0)
    most = max(longest, min(_SHARED_ROWS * longest, LONGEST_SHARED_ROW))
    tree = _Tree()
    before: tuple[int, ...] = ()
    for number in order:
        inputs = requests[number].inputs
        shared = _common(before, inputs)
        # Few tokens in common are computed again rather than tie trees together.
        worth = 2 * shared >= min(len(before), len(inputs))
        if tree.tokens and not (worth and len(tree.tokens) + len(inputs) - shared <= most):
            tree.close()
            yield tree
            tree, shared = _Tree(), 0
        tree.add(number, requests[number], shared if tree.tokens else 0)
        before = inputs
    if tree.tokens:
        tree.close()
        yield tree


def _common(first: Tokens, second: Tokens) -> int:
    """The number of tokens that both begin with."""
    length = min(len(first), len(second))
    if first[:length] == second[:length]:
        return length
    differ = np.asarray(first[:length]) != np.asarray(second[:length])
    return int(np.argmax(differ))
