"""Programs: what comes back of each kind of end, and the limits."""

import dataclasses

import pytest

from tlite_jax.evaluate.mera.execute import TIMED_OUT, Program, run_program, run_programs

HEAD = "def f(x):\n"
TESTS = "[{'x': 1}, {'x': 2}]"


def result_of(body: str, **fields):
    return run_program(Program(HEAD + body, "f", TESTS, **fields))


@pytest.mark.parametrize(
    ("body", "results"),
    [
        ("    return x + 1\n", ["2", "3"]),
        ("    return [x, (x, 'а')]\n", ["[1, (1, 'а')]", "[2, (2, 'а')]"]),
        ("    print(x)\n", [None, None]),
        ("    return 1 / (x - 1)\n", [None, "1.0"]),
        ("    return x +\n", [None, None]),
        ("    import sys; sys.exit()\n", [None, None]),
        ("    import math\n    return math.floor(x)\n", ["1", "2"]),
        ("    return os.sep\n", ["/", "/"]),  # modules that the original's program sees
        ("    return f(x - 1) if x > 1 else 0\n", ["0", None]),  # and not itself
        ("    return {'а', 'б', 'в'} == set('абв')\n", ["True", "True"]),
    ],
)
def test_results(body, results):
    assert result_of(body) == results


def test_a_function_of_another_name_is_missing():
    assert run_program(Program("def g(x):\n    return x\n", "f", TESTS)) == [None, None]


@pytest.mark.parametrize("body", ["    while True: pass\n", "    import time; time.sleep(60)\n"])
def test_an_endless_call_times_out(body):
    assert result_of(body, total_seconds=0.3) == TIMED_OUT


def test_an_endless_definition_fails():
    program = Program("while True: pass\n", "f", TESTS, define_seconds=0.2)
    assert run_program(program) == [None, None]


def test_a_program_that_ends_its_process_times_out():
    assert result_of("    os._exit(0)\n") == TIMED_OUT


def test_what_a_program_writes_goes_nowhere(tmp_path, capfd):
    assert result_of("    os.write(1, b'[9]'); print('нет'); return x\n") == ["1", "2"]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "body",
    [
        "    return len(bytearray(1 << 33))\n",
        "    return open('file', 'wb').write(bytes(1 << 22))\n",
        "    return len([open('/dev/null') for _ in range(1000)])\n",
        "    import socket\n    return socket.create_connection(('127.0.0.1', PORT), 1)\n",
    ],
)
def test_limits(body):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        results = result_of(body.replace("PORT", str(server.getsockname()[1])))
    # Where the kernel does not let the process leave the network, only the other limits hold.
    assert results in ([None, None], TIMED_OUT) or ("socket" in body and "socket.socket" in str(results))


def test_its_directory_and_environment_are_its_own(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    (first, _) = result_of("    return (os.listdir('.'), os.environ.get('HF_TOKEN'))\n")
    assert first == "([], None)"


def test_many_come_back_in_order():
    program = Program(HEAD + "    return 0\n", "f", TESTS)
    sources = [HEAD + f"    return {number}\n" for number in range(5)]
    told = []
    results = run_programs(
        [dataclasses.replace(program, source=source) for source in sources], lambda *pair: told.append(pair)
    )
    assert results == [[str(number)] * 2 for number in range(5)]
    assert told == [(number, 5) for number in range(1, 6)]
