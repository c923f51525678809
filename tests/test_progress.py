"""Progress: bars on terminals, lines elsewhere, and an estimate of what is left."""

import sys
from types import SimpleNamespace

from nonn.core import progress
from nonn.core.progress import track


def test_a_line_is_written_with_its_end(monkeypatch):
    written = []
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=written.append, flush=lambda: None))
    progress.log("node at 127.0.0.1:1")
    assert written == ["node at 127.0.0.1:1\n"]


def test_without_a_terminal_a_few_lines_are_logged(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LOG_SECONDS", 0)
    assert list(track(range(1000), "work")) == list(range(1000))
    lines = capsys.readouterr().err.splitlines()
    assert 5 <= len(lines) <= 11
    assert all(line.startswith("work: ") and line.endswith(" s left") for line in lines)
    assert lines[-1] == "work: 1000 of 1000, about 0 s left"


def test_time_left_follows_from_the_share_that_is_done(capsys, monkeypatch):
    clock = iter([100.0, 110.0, 120.0, 130.0, 140.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    list(track(range(4), "work"))
    assert capsys.readouterr().err.splitlines() == [
        "work: 1 of 4, about 30 s left",
        "work: 2 of 4, about 20 s left",
        "work: 3 of 4, about 10 s left",
        "work: 4 of 4, about 0 s left",
    ]


def test_quick_work_is_logged_at_its_end_alone(capsys):
    assert list(track(range(1000), "work")) == list(range(1000))
    assert capsys.readouterr().err == "work: 1000 of 1000, about 0 s left\n"


def test_resumed_work_says_so(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LOG_SECONDS", 0)
    assert list(track(range(8, 10), "work", done=8)) == [8, 9]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "work: resumed at 8 of 10"
    assert lines[1].startswith("work: 9 of 10, about ")
    assert lines[2] == "work: 10 of 10, about 0 s left"


def test_finished_work_has_nothing_left(capsys):
    assert list(track(range(10, 10), "work", done=10)) == []
    assert capsys.readouterr().err == "work: resumed at 10 of 10\n"


def test_iterators_need_their_number(capsys):
    assert list(track(iter("ab"), "work", total=2)) == ["a", "b"]
    assert capsys.readouterr().err.splitlines()[-1] == "work: 2 of 2, about 0 s left"


def test_on_a_terminal_there_is_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(track(range(3), "work", done=2)) == [0, 1, 2]
    shown = capsys.readouterr().err
    assert "work" in shown
    assert "2/5" in shown
