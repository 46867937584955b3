"""Offline language identifiers on short sentences of five languages, four of them in Cyrillic; docs/labels.md.

    pip install py3langid lingua-language-detector cld3-py
    python bench/languages.py

Those that are not installed are left out. Each runs in a process of its own, so that its memory is.
"""

import json
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable

SENTENCES = {
    "ru": (
        "Утром над рекой стоял густой туман, и рыбаки не спешили отвязывать лодки.",
        "Чтобы собрать ядро системы, сначала установите компилятор.",
        "Договор вступает в силу со дня подписания.",
        "Где находится вокзал?",
        "Функция возвращает пустую строку, если файл не удалось открыть.",
        "Купить диван недорого в Москве",
        "привет как дела",
        "Программа завершилась с ошибкой segmentation fault",
    ),
    "uk": (
        "Вранці над річкою стояв густий туман, і рибалки не поспішали відв'язувати човни.",
        "Щоб зібрати ядро системи, спочатку встановіть компілятор.",
        "Договір набирає чинності з дня підписання.",
        "Де знаходиться вокзал?",
        "Функція повертає порожній рядок, якщо файл не вдалося відкрити.",
        "Купити диван недорого в Києві",
        "привіт як справи",
        "Програма завершилася з помилкою",
    ),
    "be": (
        "Раніцай над ракой стаяў густы туман, і рыбакі не спяшаліся адвязваць лодкі.",
        "Каб сабраць ядро сістэмы, спачатку ўсталюйце кампілятар.",
        "Дагавор уступае ў сілу з дня падпісання.",
        "Дзе знаходзіцца вакзал?",
        "Функцыя вяртае пусты радок, калі файл не ўдалося адкрыць.",
        "Купіць канапу нядорага ў Мінску",
        "прывітанне як справы",
        "Праграма завяршылася з памылкай",
    ),
    "bg": (
        "Сутринта над реката имаше гъста мъгла и рибарите не бързаха да отвържат лодките.",
        "За да компилирате ядрото, първо инсталирайте компилатора.",
        "Договорът влиза в сила от деня на подписването.",
        "Къде се намира гарата?",
        "Функцията връща празен низ, ако файлът не може да бъде отворен.",
        "Купете евтин диван в София",
        "здравей как си",
        "Програмата завърши с грешка",
    ),
    "en": (
        "The harbour was quiet, and the last ferry had left before the rain began.",
        "To mount a file system, name the device and the directory.",
        "The contract enters into force on the day of signing.",
        "Where is the station?",
        "The function returns an empty string if the file could not be opened.",
        "Buy a cheap sofa in London",
        "hello how are you",
        "The program ended with an error",
    ),
}


def py3langid() -> Callable[[str], str]:
    """Naive Bayes over byte n-grams, 97 languages, numpy only."""
    import py3langid

    return lambda text: py3langid.classify(text)[0]


def lingua() -> Callable[[str], str | None]:
    """N-grams and rules, 75 languages, Rust."""
    from lingua import LanguageDetectorBuilder

    detector = LanguageDetectorBuilder.from_all_languages().with_preloaded_language_models().build()

    def detect(text: str) -> str | None:
        found = detector.detect_language_of(text)
        return found.iso_code_639_1.name.lower() if found else None

    return detect


def cld3() -> Callable[[str], str]:
    """A small neural network over n-grams, 107 languages, C++."""
    import gcld3

    detector = gcld3.NNetLanguageIdentifier(0, 2000)
    return lambda text: detector.FindLanguage(text).language


CONTENDERS = {function.__name__: function for function in (py3langid, lingua, cld3)}


def measure(name: str) -> dict[str, object]:
    """Right answers by language, wrong ones, milliseconds for 2,000 characters, megabytes of memory."""
    began = time.perf_counter()
    detect = CONTENDERS[name]()
    detect("проба")
    load = time.perf_counter() - began
    found = {language: [detect(sentence) for sentence in texts] for language, texts in SENTENCES.items()}
    documents = [" ".join(random.Random(i).choices(SENTENCES["ru"], k=60))[:2000] for i in range(200)]
    began = time.process_time()
    for document in documents:
        detect(document)
    return {
        "right": {language: answers.count(language) for language, answers in found.items()},
        "ms_per_2000_characters": (time.process_time() - began) / len(documents) * 1e3,
        "load_seconds": load,
        "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    """Prints one line for each identifier that is installed."""
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
        return
    for name in CONTENDERS:
        done = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, check=False)
        print(f"{name}: {done.stdout.strip() or done.stderr.strip().splitlines()[-1]}")


if __name__ == "__main__":
    main()
