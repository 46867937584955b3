"""Manual pages, HTML and fortunes become paragraphs; boilerplate and what is not Russian goes."""

import pytest

from launch.quickstart_parts import clean
from launch.quickstart_parts.html import html_to_text
from launch.quickstart_parts.roff import roff_to_text, unescape

PAGE = r"""'\" t
.\" Copyright (C) 1999 Someone
.de XX
не печатается
..
.TH ЛС 1 "Сентябрь 2022" "GNU" "Команды"
.SH ИМЯ
лс \- выводит \(Foсписок\(Fc файлов
.SH "СИНТАКСИС"
\fBлс\fP [\fI\,ПАРАМЕТР\/\fP]...
.SH ОПИСАНИЕ
.PP
Выводит информацию \(em о файлах\&. \" примечание
Сортирует их по
.BR имени (7),
если не указано \e\(aqиное\(aq.
.TP
\fB\-a\fP, \fB\-\-all\fP
не скрывать
файлы
.IP \(bu 3
первый пункт
.TS
l l.
таблица	строки
.TE
.nf
лс \-l
лс \-a
.fi
.EX
int main(void)
{
    int x = 1;
    return x;
}
.EE
.SS Коды выхода
.IP 0
все хорошо
.SH ПЕРЕВОД
Русский перевод этой страницы сделал Кто-то.
"""
PAGE_TEXT = """\fИМЯ
лс - выводит «список» файлов

\fСИНТАКСИС
лс [ПАРАМЕТР]...

\fОПИСАНИЕ
Выводит информацию — о файлах. Сортирует их по имени(7), если не указано \\'иное'.

-a, --all
не скрывать файлы
- первый пункт

лс -l
лс -a

\fКоды выхода
0 все хорошо"""


def test_a_manual_page_becomes_paragraphs() -> None:
    assert roff_to_text(PAGE) == PAGE_TEXT


def test_pages_that_only_refer_to_another_and_mdoc_are_empty() -> None:
    assert roff_to_text(".so man1/ls.1\n") == ""
    assert roff_to_text('.Dd May 1\n.Sh NAME\n.Nm ls\n.Nd "list"\n') == ""


@pytest.mark.parametrize(
    ("roff", "text"),
    [
        (r"\f[B]a\f[]\f(CWb\fR\s-1c\s0", "abc"),
        (r"\[u2014]\(->\[rs]\(rq\*(lq\*R", "—→\\”“®"),
        (r"a\ b\~c\h'2m'd\c", "a b cd"),
        (r"\-\-x\|y\^z\%\:\&.", "--xyz."),
        (r"\\n\en", "\\n\\n"),
    ],
)
def test_escapes(roff: str, text: str) -> None:
    assert unescape(roff) == text


def test_html_keeps_the_text_and_drops_navigation() -> None:
    page = """<!DOCTYPE html><html><head><title>нет</title><style>p{}</style></head><body>
    <div class="navheader"><div>назад</div><p>вперёд</p></div><nav>меню</nav><script>var x = "<p>";</script>
    <h1 id="a">Глава 1.  Начало<a class="headerlink" href="#a">¶</a></h1>
    <p>Первый <b>абзац</b>&nbsp;&mdash; о <a href="x.html">ссылке</a>,<br/>вторая строка.</p>
    <ul><li><p>один</p></li><li>два</li></ul><p><a href="y.html">Только ссылка</a></p>
    <p>Нажмите <span class="MAC"><span>Command</span></span><span>Ctrl</span>+C.</p>
    <pre>  a
    b
</pre><img src="x"><table><tr><td>к</td><td>л</td></tr></table><footer>низ</footer></body></html>"""
    assert html_to_text(page) == (
        "\fГлава 1. Начало\nПервый абзац — о ссылке,\n\nвторая строка.\n\n- один\n- два\n\n"
        "Нажмите Ctrl+C.\n\n  a\n    b\n\nк л"
    )


def test_fortunes_are_unwrapped_and_joined() -> None:
    text = (
        "Знание - сила.\n\t\t-- Ф.Бэкон\n%\n"
        "Ученый - это человек, который знает достаточно для того, чтобы\nсознавать то, чего не знает.\n"
        "\t\t-- неизвестный автор\n%\nСтих первый\nСтих второй\n\t\t--\n%\n"
    )
    joined = (
        "Знание - сила.\n— Ф.Бэкон\n\nУченый - это человек, который знает достаточно для того, чтобы сознавать то, "
        "чего не знает.\n\nСтих первый\nСтих второй"
    )
    assert clean.fortunes(text) == [joined]
    assert clean.fortunes(text, document_characters=1) == joined.split("\n\n")


def test_boilerplate_is_what_recurs_in_enough_documents() -> None:
    line, short, rare = (
        "Сообщайте обо всех ошибках по адресу проекта.",
        "ОПИСАНИЕ",
        "Эта строка встречается реже других.",
    )
    documents = [f"{short}\n{line}\n{line}\n\nТекст {n}" for n in range(4)] + [rare, rare, f"{rare}\n{line}"]
    expected = [f"{short}\n\nТекст {n}" for n in range(4)]
    assert clean.drop_boilerplate(documents, 5) == [*expected, rare, rare, rare]
    assert clean.drop_boilerplate(documents, 6) == documents
    assert clean.drop_boilerplate([f"{line}\n{line}"], 2) == [f"{line}\n{line}"], "twice in one document is once"


def test_untranslated_passages_and_listings_are_dropped() -> None:
    text = (
        "\fИМЯ\nfork - создаёт процесс\n\n"
        "\fОШИБКИ\nOn success, the PID of the child process is returned in the parent.\n\n"
        "\fЗАМЕЧАНИЯ\n- The child process is created with a single thread.\n"
        "- Потомок наследует дескрипторы open(2).\n\n"
        "int main(void)\n{\n    printf(stderr);\n    return EXIT_FAILURE;\n}"
    )
    assert clean.russian_only(text) == (
        "\fИМЯ\nfork - создаёт процесс\n\n\fЗАМЕЧАНИЯ\n- Потомок наследует дескрипторы open(2)."
    )
    assert clean.russian_only("An English page.\n\nБез перевода occurs here as aforementioned") == ""
    assert clean.drop_empty_sections("\fA\n\n\fB\ntext") == "\fB\ntext"
