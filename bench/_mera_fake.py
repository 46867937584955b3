"""A language model without a model: its answers are a function of the text, the same wherever it is asked."""

import re
import zlib
from collections.abc import Callable, Sequence


def score_text(text: str) -> float:
    """Nats of a whole text."""
    return -len(text) - (zlib.crc32(text.encode()) % 1_000_000) / 1_000_000


def write_text(context: str, seed: int | None) -> str:
    """What follows a context: words of it, numbers, or for a function its body, right or wrong in many ways."""
    code = zlib.crc32(f"{seed} {context}".encode())
    function = re.search(r"def (plus_(\d))\(", context)
    if function is not None:
        name, add = function.groups()
        return _BODIES[code % len(_BODIES)].replace("NAME", name).replace("ADD", add)
    numbers = [str(code // power % 4 + 1) for power in (7, 5, 3, 11)]
    sum_asked = re.search(r"(\d+) \+ (\d+) (=|->)\s*$", context)
    if sum_asked is not None:
        return f" {int(sum_asked[1]) + int(sum_asked[2]) + code % 2}"
    words = re.findall(r"\w+", context) or ["нет"]
    place = words[code % len(words)]
    named = [word for word in words if word.istitle() and word not in _LABELS] or words
    choices = [f" {place}", f" {named[code % len(named)]}", f" город {named[-1]}!", " ХОЛОДНЫЙ ", "", " the 4"]
    choices += [",".join(numbers), ",".join(numbers[:2]), f" {numbers[0]},{numbers[1]},{numbers[2]}"]
    return choices[code // 13 % len(choices)]


_BODIES = (
    "    return x + ADD\n",
    "    return x + ADD\n",
    "    return str(x + ADD)\n",
    "    return x\n",
    "    return x +\n",
    "    import math\n    return math.floor(x + ADD)\n",
    "    return os.path.getsize('nothing')\n",
    "    return ADD if x <= 0 else 1 + NAME(x - 1)\n",
    "    print(x)\n",
    "    raise ValueError\n",
    "",
)


_LABELS = ("Ответ", "Вопрос", "Текст", "Город", "Категория")


class FakeModel:
    """What `tlite_jax.evaluate.mera.model.TextModel` asks for, made of the two functions above."""

    def score(self, pairs: Sequence[tuple[str, str]], progress: Callable[[int, int], None]) -> list[float]:
        """See TextModel."""
        scores = [score_text(context + continuation) for context, continuation in pairs]
        progress(len(pairs), len(pairs))
        return scores

    def generate(
        self,
        contexts: Sequence[str],
        *,
        stops: Sequence[str],
        max_tokens: int,
        seed: int | None,
        progress: Callable[[int, int], None],
    ) -> list[str]:
        """See TextModel."""
        texts = [write_text(context, seed) for context in contexts]
        for stop in stops:
            texts = [text.split(stop)[0] for text in texts]
        progress(len(texts), len(texts))
        return texts
