import html
import json
import re
import shutil
import subprocess
import threading
import urllib.error
import urllib.request
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.launch.in_process import run_command
from tests.report.written import read_lines, write_run
from tlite_jax.errors import UserError
from tlite_jax.report.page import render
from tlite_jax.report.read import read_run
from tlite_jax.report.serve import make_server

VOID = {"meta", "link", "rect", "line", "circle", "path"}


class Page(HTMLParser):
    """Tables as rows of texts; fails on tags that do not match."""

    def __init__(self, text: str):
        super().__init__()
        self.rows: list[list[str]] = []
        self.links: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == [], "left open"

    def handle_starttag(self, tag, attrs):
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "action")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self._open[-3:]):
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="module")
def page(run_directory: Path) -> str:
    return render(read_run(run_directory))


def row(page: str, name: str) -> list[str]:
    (found,) = (row for row in Page(page).rows if row and row[0] == name)
    return found


def test_nothing_comes_from_elsewhere(page):
    assert set(Page(page).links) <= {"data:,"}
    assert not re.search(r"url\((?!#)|@import|https?://(?!www\.w3\.org)", page)


def test_names_from_the_run_are_text(page):
    assert "<code>" not in page
    assert row(page, 'domain=<code> & "co"')[2] == "1.0100"
    assert row(page, "<wiki>")[1] == "9,000"


def test_the_board_has_base_now_and_change(page):
    assert row(page, "language=ru") == ["language=ru", "1.0000", "0.8000", "-0.2000", "0.0000"]
    assert row(page, "language=en") == ["language=en", "1.0000", "1.0300", "+0.0300", "0.1000"]
    assert "bits_per_byte/language=en passed its limit" in page
    assert "and still is" in page


def test_the_mixture_is_planned_against_consumed(page):
    assert row(page, "en") == ["en", "15.00%", "15.00%", "+0.00", "1,200"]
    assert row(page, "books") == ["books", "1,000", "2.400", "2.000", "25.00%", "25.00%", "+0.00", "2,000"]


def test_the_hours_add_up(page):
    shares = [row(page, name)[2] for name in ("steps that count", "compiling", "steps lost and done again")]
    assert shares == ["95.63%", "0.38%", "1.91%"]
    kinds = [row[4] for row in Page(page).rows if row and row[0] in ("1", "2")]
    assert kinds == ["killed", "done"]
    total = sum(float(row[2].rstrip("%")) for row in Page(page).rows if len(row) == 3 and row[2].endswith("%"))
    assert total == pytest.approx(100, abs=0.05)


def legends(page: str, caption: str) -> list[str]:
    """The lines of the charts whose captions begin so."""
    charts = re.findall(r"<figcaption>(.*?)</figcaption>.*?<ul class=\"legend\">(.*?)</ul>", page, re.DOTALL)
    return [
        name for found, legend in charts if found.startswith(caption) for name in re.findall("</i>(.*?)</li>", legend)
    ]


def points(page: str, name: str) -> list[list[float]]:
    """Of the last line of that name."""
    charts = [json.loads(html.unescape(text)) for text in re.findall(r'data-lines="(.*?)"', page)]
    return [line["points"] for chart in charts for line in chart["lines"] if line["name"] == name][-1]


def test_the_loss_of_each_bucket_is_drawn_where_there_is_one(page):
    assert sorted(legends(page, "loss by bucket")) == ["&lt;wiki&gt;", "books", "web"]
    web, books = points(page, "web"), points(page, "books")
    assert all(above - below == pytest.approx(1, abs=1e-3) for (_, below), (_, above) in zip(web, books, strict=True))


def test_norms_by_group_are_drawn(page):
    for what in ("gradient norm: ", "norm of update / norm of parameters: "):
        assert legends(page, f"{what}mlp") == ["mlp.0", "mlp.1"]
        assert legends(page, f"{what}embedding") == ["embedding", "head", "norms"]
    assert {y for _, y in points(page, "norms")} == {float(f"{1e-4 / 7:.5g}")}


def test_slow_processes_are_listed(page):
    slow, devices, again = (row for row in Page(page).rows if len(row) == 5 and "(<n3>)" in row[2])
    cause = "data wait 80%, other work of its host 10%, waited for a CPU 60%"
    assert (slow[0], *slow[2:]) == ("100", "3 (<n3>)", "1.4", cause)
    assert devices[4].startswith("its devices are 1.3 times slower, data wait 0%")
    assert again[3:] == ["", "keeps up with the others again"]


def test_a_run_that_has_just_begun_has_a_page(tmp_path, run_directory):
    (tmp_path / "run").mkdir()
    shutil.copy(run_directory / "config.yaml", tmp_path / "run")
    page = render(read_run(tmp_path / "run"))
    Page(page)
    assert "not started" in page
    assert "by group" not in page
    assert "Slow" not in page
    assert page.count("nothing yet") == 3


def test_a_loss_that_is_not_finite_is_said(tmp_path, run_directory):
    copy = tmp_path / "run"
    shutil.copytree(run_directory, copy)
    lines = read_lines(copy / "metrics.jsonl")
    for line in lines[500:503]:
        line["loss"] = "nan"
    (copy / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "not finite at 3 of 1000 logged steps" in render(read_run(copy))


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        read_run(tmp_path)


def test_a_served_page_is_new_each_time():
    count = iter(range(10))

    def page() -> str:
        number = next(count)
        if number == 1:
            raise UserError("half written")
        return f"page {number}"

    with make_server(page, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}/"
            assert urllib.request.urlopen(url).read() == b"page 0"
            with pytest.raises(urllib.error.HTTPError, match="503"):
                urllib.request.urlopen(url)
            assert urllib.request.urlopen(f"{url}?again").read() == b"page 2"
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(f"{url}../secret")
        finally:
            server.shutdown()
            thread.join()


def test_a_port_that_is_taken_is_refused():
    with make_server(str, "127.0.0.1", 0) as server, pytest.raises(UserError, match="choose another --host or --port"):
        make_server(str, "127.0.0.1", server.server_port)


BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")


@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_a_browser_draws_it_without_complaint(tmp_path, page):
    probe = "<script>addEventListener('error', e => document.title = 'ERROR ' + e.message)</script></head>"
    path = tmp_path / "page.html"
    path.write_text(page.replace("</head>", probe), encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    command += ["--virtual-time-budget=2000", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in result.stderr
    assert "<title>ERROR" not in result.stdout
    assert result.stdout.count('class="tip"') == page.count("<figure")  # the script went to its end


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "."], "--out . is a directory; give a file, such as report.html"),
        (["--out", "nowhere/page.html"], "cannot write nowhere/page.html: No such file or directory"),
        (["--serve", "--port", "99999"], "cannot listen on 127.0.0.1:99999"),
        (["--serve", "--host", "no such host"], "choose another --host or --port"),
    ],
)
def test_where_a_page_cannot_go_is_one_line(run_directory, words, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    ended = run_command(monkeypatch, capsys, "report", run_directory, *words)
    assert (ended.status, ended.out) == (2, "")
    assert ended.err.startswith("error: ")
    assert message in ended.err
