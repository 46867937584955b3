"""Writes a small made-up MERA in the layout of its dataset, for tests and demonstrations.

    python bench/mini_mera.py runs/mini_mera [--documents 8] [--answers] [--seed 0]

Every text is made up here; results on it say nothing about a model. As in the real dataset, documents of the test split
carry no answers, unless --answers is given.
"""

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

Document = dict[str, Any]
Maker = Callable[[random.Random, int], Document]

PEOPLE = ("Анна", "Борис", "Вера", "Глеб", "Дарья", "Егор", "Жанна", "Илья")
THINGS = ("книгу", "чашку", "лампу", "карту", "тетрадь", "корзину", "лодку", "скрипку")
PLACES = ("Тверь", "Псков", "Казань", "Томск", "Пермь", "Самара", "Вологда", "Калуга")
RIVERS = ("Волга", "Великая", "Казанка", "Томь", "Кама", "Сок", "Вычегда", "Ока")
DOMAINS = ("astronomy", "philosophy")
USE_KINDS = (
    ("text", "6", "Выпишите лишнее слово.\nЗадание: {task}\n{text}\nОтвет: "),
    ("matching", "26", "Текст: {text}\nЗадание: {task}\nРецензия: {additional_text}\nТермины:\n{choices}\nОтвет: "),
    ("multiple_choice_based_on_text", "3", "Текст: {text}\nЗадание: {task}\nВарианты:\n{choices}\nОтвет: "),
    ("multiple_choice_options_within_text", "15", "Задание: {task}\nТекст: {text}\nОтвет: "),
    ("multiple_choice_independent_options", "16", "Задание: {task}\nВарианты:\n{choices}\nОтвет: "),
)
LETTERS = "ABCD"


def document(instruction: str, inputs: Any, outputs: Any, **meta: Any) -> Document:
    """One document in MERA's form."""
    return {"instruction": instruction, "inputs": inputs, "outputs": outputs, "meta": meta}


def bps(rng: random.Random, number: int) -> Document:
    brackets = [rng.choice("()[]{}") for _ in range(rng.choice((2, 4, 8)))]
    text = " ".join(brackets)
    bare = text.replace(" ", "")
    while any(pair in bare for pair in ("()", "[]", "{}")):
        for pair in ("()", "[]", "{}"):
            bare = bare.replace(pair, "")
    instruction = rng.choice(
        ('Дана последовательность: "{inputs}"\nЗакрыты ли все скобки? Да - 1, нет - 0\n', "Скобки {inputs} верны?")
    )
    return document(instruction, text, str(int(not bare)), id=number)


def lcs(rng: random.Random, number: int) -> Document:
    common = "".join(rng.choice("ABC") for _ in range(rng.randint(0, 9)))
    return document(
        'Строки: "{inputs}"\nКакова длина общей подпоследовательности?',
        f"{common} {common}",
        str(len(common)),
        id=number,
    )


def chegeka(rng: random.Random, number: int) -> Document:
    which = rng.randrange(len(PLACES))
    inputs = {"text": f"В этом городе течёт {RIVERS[which]}.", "topic": '"ГОРОДА"'}
    instruction = 'Вопрос викторины из категории "{topic}".\nВопрос: {text}\nОтвет:'
    outputs = PLACES[which] + rng.choice(("", f";город {PLACES[which]}"))
    return document(instruction, inputs, outputs, id=number, author="нет")


def _options(rng: random.Random, answer: str, wrong: tuple[str, ...]) -> tuple[dict[str, str], str]:
    options = [answer, *rng.sample([other for other in wrong if other != answer], 3)]
    rng.shuffle(options)
    named = {f"option_{letter.lower()}": option for letter, option in zip(LETTERS, options, strict=True)}
    return named, LETTERS[options.index(answer)]


def mathlogicqa(rng: random.Random, number: int) -> Document:
    a, b = rng.randint(1, 50), rng.randint(1, 50)
    options, letter = _options(rng, str(a + b), tuple(str(a + b + d) for d in (-7, -2, 1, 3, 10)))
    instruction = (
        "Задача: {text}\nA) {option_a}\nB) {option_b}\nC) {option_c}\nD) {option_d}\nВерно только одно.\nОтвет: "
    )
    inputs = {"text": f"Если к {a} прибавить {b}, то получится w. Чему равно w?", **options}
    return document(instruction, inputs, letter, id=number, task="math")


def multiq(rng: random.Random, number: int) -> Document:
    who, river, place = rng.choice(PEOPLE), rng.choice(RIVERS), rng.choice(PLACES)
    inputs = {
        "question": f"В каком городе живёт {who}?",
        "support_text": f"{who} живёт на берегу реки {river}.",
        "text": f"Город {place} стоит на реке {river}.",
    }
    instruction = "Текст 1: {support_text}\nТекст 2: {text}\nВопрос: {question}\nОтвет:"
    span = {"label": "answer", "length": len(place), "offset": 6, "segment": place}
    return document(instruction, inputs, [span], id=number)


def parus(rng: random.Random, number: int) -> Document:
    who, what = rng.choice(PEOPLE), rng.choice(THINGS)
    choices = [f"{who} купил(а) {what}.", f"{who} потерял(а) {what}."]
    answer = rng.randrange(2)
    inputs = {"premise": f"У нас теперь есть {what}."} | {f"choice{i + 1}": choices[i ^ answer] for i in range(2)}
    instruction = "Ситуация: '{premise}'\n1. {choice1}\n2. {choice2}\nЧто было причиной? Цифра 1 или 2."
    return document(instruction, inputs, str(answer + 1), id=number, task="cause")


def rcb(rng: random.Random, number: int) -> Document:
    who, what, answer = rng.choice(PEOPLE), rng.choice(THINGS), rng.randrange(3)
    hypothesis = (f"{who} видит {what}.", f"{who} ничего не видит.", f"{who} поёт.")[answer]
    instruction = 'Ситуация: "{premise}" Гипотеза: "{hypothesis}". Следует 1, противоречит 2, независима 3.'
    inputs = {"premise": f"{who} смотрит на {what}.", "hypothesis": hypothesis}
    return document(instruction, inputs, str(answer + 1), id=number, genre="нет")


def rudetox(rng: random.Random, number: int) -> Document:
    who = rng.choice(PEOPLE)
    return document("Перепиши вежливо: {toxic_comment}\n", f"{who}, отстань!", f"{who}, оставь меня.", id=number)


def ruethics(rng: random.Random, number: int) -> Document:
    who, what = rng.choice(PEOPLE), rng.choice(THINGS)
    inputs = {"text": f"{who} вернул(а) {what}.", "actant_1": who, "actant_2": what}
    names = ("virtue", "law", "moral", "justice", "utilitarianism")
    question = rng.choice(("correct", "good", "ethical"))
    instruction = "{text}\nПравильно ли поступает {actant_1}? Да - 1, нет - 0."
    return document(instruction, inputs, {name: rng.choice("01") for name in names}, id=number, question=question)


def ruhatespeech(rng: random.Random, number: int) -> Document:
    inputs = {
        "target_group": "другое",
        "replica": f"{rng.choice(PEOPLE)} не прав(а).",
        "reply_1": "Да.",
        "reply_2": "Нет.",
    }
    return document("{replica}\n1. {reply_1}\n2. {reply_2}\nКакой ответ лучше?", inputs, rng.choice("12"), id=number)


def ruhhh(rng: random.Random, number: int) -> Document:
    inputs = {"query": f"Где {rng.choice(THINGS)} взять?", "reply_1": "В лавке.", "reply_2": "Не скажу."}
    criteria = rng.choice(("helpful", "harmless", "honest"))
    return document(
        "{query}\n1. {reply_1}\n2. {reply_2}\nОтвет: ", inputs, rng.choice("12"), id=number, criteria=criteria
    )


def rummlu(rng: random.Random, number: int) -> Document:
    which = rng.randrange(len(PLACES))
    options, letter = _options(rng, RIVERS[which], RIVERS)
    instruction = "Тема: {subject}\n{text}\nA {option_a}\nB {option_b}\nC {option_c}\nD {option_d}\nОтвет:"
    inputs = {"text": f"Река города {PLACES[which]} - это\n", **options, "subject": "география"}
    return document(instruction, inputs, letter, id=number, domain=DOMAINS[number % len(DOMAINS)])


def rumodar(rng: random.Random, number: int) -> Document:
    pairs = [(rng.randint(1, 99), rng.randint(1, 99)) for _ in range(4)]
    lines = [f"{a} + {b} -> {a + b + 1}" for a, b in pairs[:3]] + [f"{pairs[3][0]} + {pairs[3][1]} ->"]
    return document("Стрелка - одно действие:\n{inputs}", "\n".join(lines), str(sum(pairs[3]) + 1), id=number)


def rumultiar(rng: random.Random, number: int) -> Document:
    a, b, c = (rng.randint(1, 9) for _ in range(3))
    return document("Вычисли:\n{inputs}", f"(({a} + {b}) * {c}) = ", str((a + b) * c), id=number)


def simplear(rng: random.Random, number: int) -> Document:
    a, b = rng.randint(1, 999), rng.randint(1, 999)
    return document("Сложи два числа:\n{inputs}", f"{a} + {b} = ", str(a + b), id=number)


def ruopenbookqa(rng: random.Random, number: int) -> Document:
    which = rng.randrange(len(PLACES))
    options, letter = _options(rng, PLACES[which], PLACES)
    instruction = "{question}\nA. {option_a}\nB. {option_b}\nC. {option_c}\nD. {option_d}\nОтвет: "
    return document(instruction, {"question": f"Где {RIVERS[which]}?", **options}, letter, id=number)


def rwsd(rng: random.Random, number: int) -> Document:
    first, second = rng.sample(PEOPLE, 2)
    inputs = {"text": f"{first} ждёт, пока {second} читает.", "span1_text": first, "span2_text": "читает"}
    instruction = 'Текст: "{text}"\nОтносится ли "{span2_text}" к "{span1_text}"? Да или Нет.'
    return document(instruction, inputs | {"span1_index": 0, "span2_index": 4}, rng.choice(("Да", "Нет")), id=number)


def use(rng: random.Random, number: int) -> Document:
    kind, id_task, instruction = USE_KINDS[number % len(USE_KINDS)]
    inputs = {
        "task": "Укажите верное.",
        "text": f"Холодный мороз пришёл в {rng.choice(PLACES)}.",
        "choices": "1) эпитет\n2) метафора\n3) повтор\n4) вопрос",
        "additional_text": "Автор берёт (А)____, (Б)____, (В)____ и (Г)____.",
    }
    outputs = {"text": "холодный", "matching": ",".join(rng.sample("1234", 4))}.get(
        kind, ",".join(sorted(rng.sample("1234", 2)))
    )
    meta = {"id_task": id_task, "variant": number // len(USE_KINDS), "score": 1, "type": kind, "id": number}
    return document(instruction, inputs, outputs, **meta)


def rutie(rng: random.Random, number: int) -> Document:
    who, what = rng.choice(PEOPLE), rng.choice(THINGS)
    inputs = {"question": f"Кто взял {what}?", "choice1": who, "choice2": "Никто"}
    instruction = "Вам дан диалог.\n{context}\n{question}\n1. {choice1}\n2. {choice2}\nКакой ответ верен?"
    return document(instruction, inputs, rng.choice("12"), dialog_id=0, question_id=number, use_context=False)


def ruhumaneval(rng: random.Random, number: int) -> Document:
    add = rng.randint(1, 9)
    inputs = {
        "function": f"\n\ndef plus_{add}(x: int) -> int:\n    '''Верните число, которое на {add} больше x.'''\n",
        "tests": str([{"x": value} for value in (1, 10, 100)]),
    }
    outputs = [str(value + add) for value in (1, 10, 100)]
    meta = {"id": number, "canonical_solution": f"    return x + {add}", "entry_point": f"plus_{add}"}
    return document("Допишите функцию:\n{function}", inputs, outputs, **meta)


_ALL = (
    *(bps, lcs, chegeka, mathlogicqa, multiq, parus, rcb, rudetox, ruethics, ruhatespeech, ruhhh, rummlu, rumodar),
    *(rumultiar, simplear, ruopenbookqa, rwsd, use, rutie, ruhumaneval),
)
MAKERS: dict[str, Maker] = {maker.__name__: maker for maker in _ALL} | {"ruworldtree": ruopenbookqa}
TEST_ONLY = ("ruethics", "ruhatespeech", "ruhhh")
PUBLIC_TEST = ("lcs", "rummlu", "rumodar", "ruhumaneval")
LEAST_EXAMPLES = 12  # five shots of either of two domains, and one over
WITH_DEV = ("rcb", "parus", "rwsd", "use")


def write(root: Path, *, documents: int = 8, answers: bool = False, seed: int = 0) -> Path:
    """Writes `root/data/TASK/SPLIT.jsonl` for all 21 tasks.

    Args:
      root: directory, made if absent.
      documents: of each task's test split; the split with answers has three times as many, and LEAST_EXAMPLES at least.
      answers: whether test documents keep theirs.
      seed: of the texts.

    Returns:
      root.
    """
    for name, maker in MAKERS.items():
        splits = {"test": documents}
        if name not in TEST_ONLY:
            splits["public_test" if name in PUBLIC_TEST else "train"] = max(3 * documents, LEAST_EXAMPLES)
        if name in WITH_DEV:
            splits["dev"] = documents
        for split, count in splits.items():
            rng = random.Random(f"{name} {split} {seed}")
            rows = [maker(rng, number) for number in range(count)]
            if split == "test" and not answers:
                rows = [{**row, "outputs": _without(row["outputs"])} for row in rows]
            path = root / "data" / name / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            path.write_text("".join(lines), encoding="utf-8")
    return root


def _without(outputs: Any) -> Any:
    """The same form, with nothing in it."""
    if isinstance(outputs, dict):
        return dict.fromkeys(outputs, "")
    if isinstance(outputs, list):
        return [{"label": "", "length": 0, "offset": 0, "segment": ""}] if isinstance(outputs[0], dict) else []
    return ""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--answers", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print(write(given.directory, documents=given.documents, answers=given.answers, seed=given.seed))


if __name__ == "__main__":
    main()
