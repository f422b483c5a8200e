"""The views of progress: what they say, when they keep quiet, and that they never disturb a study."""

import ast
import io
import logging
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
from rich.console import Console

from fedmentor_core.progress import ProgressEvent
from flows import progress_view, quiet
from flows.progress_view import LiveView, PlainView, ProgressState, duration, make_listener

DOMAINS = ("stress", "interpersonal", "wellbeing")


class FakeClock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def play(listener, clock, rounds=3, steps=12, first=0):
    """A whole study: 6 s of baseline, rounds of 30 s."""
    listener(ProgressEvent("prepare", "read 3 domains", n_rounds=rounds))
    for domain in DOMAINS:
        clock.now += 2
        listener(ProgressEvent("baseline", domain=domain, completed=24, total=24, n_rounds=rounds))
    for index in range(first, rounds + first):
        common = {"round_index": index, "n_rounds": rounds}
        for domain in DOMAINS:
            for step in range(1, steps + 1):
                clock.now += 0.5
                listener(ProgressEvent("train", domain=domain, completed=step, total=steps, **common))
        clock.now += 2
        listener(ProgressEvent("aggregate", "3 updates joined", **common))
        for domain in DOMAINS:
            clock.now += 3
            listener(ProgressEvent("evaluate", domain=domain, completed=24, total=24, **common))
        clock.now += 1
        listener(ProgressEvent("gate", "passed 4 of 4 [overall]", **common))
    listener(ProgressEvent("final", "test set scored"))
    listener(ProgressEvent("done", "promoted fedmentor-adapter v1"))


def text_console(width=100, **options):
    return Console(file=io.StringIO(), width=width, **options)


def test_plain_lines_are_few_and_say_what_matters():
    console, clock = text_console(width=30), FakeClock()
    play(PlainView(console, clock), clock)
    lines = console.file.getvalue().splitlines()
    assert all(line[2] == line[5] == ":" for line in lines)
    text = "\n".join(line[9:] for line in lines)
    for number in (1, 2, 3):
        assert f"round {number} of 3 · gate · passed 4 of 4 [overall]" in text
        assert text.count(f"round {number} of 3 · training · stress · 12 of 12") == 1
    assert "read 3 domains" in text
    assert "promoted fedmentor-adapter v1" in text
    assert "left" in text
    assert len(lines) <= 1 + 3 + 3 * (3 + 1 + 3 + 1) + 2 + 9


def test_a_long_stage_gives_a_sign_of_life_every_ten_seconds():
    console, clock = text_console(), FakeClock()
    view = PlainView(console, clock)
    for step in range(1, 60):
        clock.now += 1
        view(ProgressEvent("train", domain="stress", completed=step, total=100, round_index=0, n_rounds=1))
    assert len(console.file.getvalue().splitlines()) == 5


@pytest.mark.parametrize("first", [0, 1])
def test_rounds_count_from_one_and_the_bar_ends_full(first):
    clock = FakeClock()
    state = ProgressState(clock)
    seen = []

    def listener(event):
        state.update(event)
        seen.append((state.round_number, state.rounds_done))

    play(listener, clock, first=first)
    assert next(number for number, _ in seen if number) == 1
    assert seen[-1] == (3, 3.0)
    done = [share for _, share in seen]
    assert done == sorted(done)


def test_time_left_is_close_once_something_is_known():
    clock = FakeClock()
    state = ProgressState(clock)
    guesses = []

    def listener(event):
        state.update(event)
        guesses.append((clock.now, state.seconds_left()))

    play(listener, clock)
    known = [(now, left) for now, left in guesses if left is not None]
    assert len(known) > 80
    for now, left in known:
        assert abs(now + left - clock.now) < 0.25 * (clock.now - 100) + 5
    assert guesses[0][1] is None


def test_auto_is_plain_away_from_a_terminal_and_quiet_says_nothing(capsys):
    console = text_console()
    with make_listener("auto", console) as listener:
        assert isinstance(listener, PlainView)
    with make_listener("quiet") as listener:
        play(listener, FakeClock())
    assert capsys.readouterr().out == ""


def test_auto_is_live_on_a_terminal():
    console = text_console(force_terminal=True, _environ={"TERM": "xterm"})
    with make_listener("auto", console) as listener:
        assert isinstance(listener, LiveView)
        play(listener, FakeClock())
    shown = console.file.getvalue()
    assert "passed 4 of 4 [overall]" in shown
    assert "promoted fedmentor-adapter v1" in shown


def test_the_live_view_shows_round_clients_and_times():
    console, clock = text_console(width=90, force_terminal=True, color_system=None), FakeClock()
    view = LiveView(console, clock)
    view(ProgressEvent("prepare", n_rounds=3))
    console.print(view)
    for index, step in ((0, 5), (0, 12), (1, 6)):
        for domain in (*DOMAINS, *(f"more-{i}" for i in range(12))):
            clock.now += 1
            event = ProgressEvent("train", "", index, 3, domain, step, 12)
            view(event)
    console.print(view)
    shown = console.file.getvalue()
    assert "round 2 of 3" in shown
    assert "stress" in shown
    assert "6 of 12" in shown
    assert "and 3 more, 0 finished" in shown
    assert "45 s gone, about" in shown


def test_the_terminal_is_restored_after_ctrl_c():
    console = text_console(force_terminal=True, _environ={"TERM": "xterm"})

    def interrupted():
        with make_listener("live", console) as listener:
            listener(ProgressEvent("train", domain="stress", completed=1, total=2, round_index=0, n_rounds=1))
            raise KeyboardInterrupt

    stdout = sys.stdout
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert sys.stdout is stdout
    shown = console.file.getvalue()
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")
    refreshing = [t for t in threading.enumerate() if type(t).__name__ == "_RefreshThread"]
    for thread in refreshing:
        thread.join(timeout=5)
        assert not thread.is_alive()


def test_two_live_views_on_one_console_do_not_clash():
    console = text_console(force_terminal=True, _environ={"TERM": "xterm"})
    with make_listener("live", console) as outer, make_listener("live", console) as inner:
        play(outer, FakeClock())
        play(inner, FakeClock())


@pytest.mark.parametrize("mode", ["plain", "live"])
def test_a_broken_output_never_reaches_the_study(mode):
    class Broken(io.StringIO):
        def write(self, _):
            raise BrokenPipeError

    console = Console(file=Broken(), force_terminal=mode == "live", _environ={"TERM": "xterm"})
    with make_listener(mode, console) as listener:
        play(listener, FakeClock())
        listener(None)
        listener(ProgressEvent("no such stage", completed=5, total=0))  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["plain", "live"])
def test_threads_may_all_speak_at_once(mode):
    console = text_console(force_terminal=mode == "live", _environ={"TERM": "xterm"})

    def client(name):
        for step in range(1, 201):
            listener(ProgressEvent("train", domain=name, completed=step, total=200, round_index=0, n_rounds=1))

    with make_listener(mode, console) as listener:
        threads = [threading.Thread(target=client, args=(f"client-{i}",)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=20)
        assert not any(thread.is_alive() for thread in threads)
        assert {bar.completed for bar in listener.state.bars.values()} == {200}
        assert len(listener.state.bars) == 8


def test_messages_can_steer_neither_terminal_nor_markup():
    console = text_console()
    with make_listener("plain", console) as listener:
        listener(ProgressEvent("gate", "\x1b[2Jfoo\nbar [bold]x[/bold]", round_index=0, n_rounds=1))
    shown = console.file.getvalue()
    assert "\x1b" not in shown
    assert shown.count("\n") == 1
    assert "[bold]x[/bold]" in shown


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.4, "0 s"), (200, "3 min 20 s"), (700, "11 min"), (7500, "2 h 5 min")]
)
def test_duration(seconds, shown):
    assert duration(seconds) == shown


def test_neither_module_imports_anything_heavy():
    for module in (progress_view, quiet):
        for node in ast.walk(ast.parse(Path(module.__file__).read_text(encoding="utf-8"))):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            assert not {name.split(".")[0] for name in names} & {"prefect", "mlflow", "torch", "transformers"}


def test_silence_sets_what_is_not_set_and_keeps_real_errors(monkeypatch):
    with warnings.catch_warnings():
        monkeypatch.setattr(os, "environ", {"TOKENIZERS_PARALLELISM": "true"})
        levels = {name: logging.getLogger(name).level for name in quiet.LOGGERS}
        try:
            quiet.silence_libraries()
            quiet.silence_libraries()
            assert os.environ["TOKENIZERS_PARALLELISM"] == "true"
            assert os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
            assert os.environ["DO_NOT_TRACK"] == "1"
            assert all(logging.getLogger(name).isEnabledFor(logging.ERROR) for name in quiet.LOGGERS)
            with warnings.catch_warnings(record=True) as caught:
                warnings.warn("Secure RNG turned off. This is perfectly fine", stacklevel=1)
                warnings.warn("the gradients overflowed", RuntimeWarning, stacklevel=1)
            assert [str(one.message) for one in caught] == ["the gradients overflowed"]
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


def test_silence_is_cheap_and_imports_nothing_heavy():
    code = (
        "import sys; from flows.quiet import silence_libraries; silence_libraries();"
        "print(sorted({'torch', 'prefect', 'mlflow', 'transformers', 'rich', 'pydantic'} & set(sys.modules)))"
    )
    root = Path(quiet.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
