"""Documents written for the tests of this directory."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

RUSSIAN = (
    "Утром над рекой стоял густой туман, и рыбаки не спешили отвязывать лодки.",
    "Библиотекарь перебрала картотеку и нашла потерянный в прошлом году том.",
    "Чтобы собрать ядро системы, сначала установите компилятор и заголовочные файлы.",
    "Поезд до Твери отправляется с четвёртого пути в семь часов сорок минут.",
    "Суд отложил заседание, поскольку ответчик не представил нужных документов.",
    "Бабушка пекла пироги с капустой и рассказывала о том, как ходила пешком в город.",
    "Учёные измерили скорость ветра на вершине горы и сравнили её с расчётами.",
    "Команда выводит список файлов каталога; ключ сортирует его по времени.",
    "Осенью листья клёна краснеют раньше, чем желтеет берёза у старого забора.",
    "Договор вступает в силу со дня подписания и действует до конца года.",
    "Мальчик долго смотрел на шахматную доску, но так и не увидел мата в два хода.",
    "Врач посоветовал больше гулять, меньше волноваться и пить тёплое молоко.",
    "На рынке продавали мёд, грибы, шерстяные носки и самодельные игрушки.",
    "Функция возвращает пустую строку, если файл не удалось открыть для чтения.",
)
ENGLISH = (
    "The harbour was quiet, and the last ferry had left before the rain began.",
    "To mount a file system, name the device and the directory it should appear in.",
    "She kept the letters in a tin box under the stairs and never spoke of them.",
    "The committee asked for a second opinion on the strength of the old bridge.",
    "Water the seedlings early, before the sun reaches the greenhouse windows.",
    "If the option is given twice, the program prints every file that it reads.",
    "Two carpenters spent the winter repairing the organ loft of the village church.",
    "A good map tells you where the paths are; a better one tells you where they were.",
    "The witness could not remember whether the shop had been open on that Sunday.",
    "Each process writes its own log, and the oldest log is removed when the disk fills.",
)


def make_texts(sentences: Sequence[str], count: int, seed: int, longest: int = 12) -> list[str]:
    """Distinct documents of sentences in a random order, of very different lengths."""
    rng = np.random.default_rng(seed)
    texts = []
    for number in range(count):
        chosen = rng.choice(len(sentences), rng.integers(1, longest + 1))
        texts.append(f"{number + 1}. " + " ".join(sentences[i] for i in chosen))
    return texts


def write_jsonl(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path
