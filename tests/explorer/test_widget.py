import sys
import threading

import pytest

from patchlab.errors import OutputError, ScoreError
from patchlab.explorer.widget import Desk, missing, script, widget_of


class Office:
    """A desk whose questions have answers made by hand, and what it sent."""

    def __init__(self):
        self.sent, self.asked, self.waits = [], [], {}
        self.desk = Desk(lambda: {"title": "state"}, self.ask, lambda content, buffers=None: self.sent.append((content, buffers)))

    def ask(self, *question, tick=None):
        self.asked.append(question)
        if question[0] == "refused":
            raise ScoreError("no such cell")
        if question[0] == "broken":
            raise ZeroDivisionError("by zero")
        if question[0] == "long":
            for n in range(1000):
                tick(n)
                self.waits["reached"].set()
                self.waits["go"].wait(10)
        return {"of": list(question)}

    def say(self, number, *question):
        self.desk.receive({"id": number, "ask": list(question)})

    def contents(self):
        self.desk.join()
        return [content for content, _ in self.sent]


@pytest.fixture
def office():
    return Office()


def test_questions_are_answered_in_their_order_with_their_number(office):
    office.say("a.1", "state")
    office.say(2, "exact", "denoising", "z", 3)
    assert office.contents() == [{"id": "a.1", "answer": {"title": "state"}}, {"id": 2, "answer": {"of": ["exact", "denoising", "z", 3]}}]


def test_plotly_is_sent_as_bytes_and_not_kept_in_the_widget(office):
    office.say(1, "plotly")
    assert office.contents() == [{"id": 1, "answer": {}}]
    assert len(office.sent[0][1][0]) > 1e6
    assert len(script("widget")) < 80_000


def test_what_cannot_be_answered_is_said_and_the_next_is_answered(office):
    office.say(1, "refused")
    office.say(2, "broken")
    office.say(3, "fine")
    assert office.contents() == [
        {"id": 1, "error": "no such cell"},
        {"id": 2, "error": "ZeroDivisionError: by zero"},
        {"id": 3, "answer": {"of": ["fine"]}},
    ]


def test_a_sweep_sends_each_cell_as_it_is_finished(office):
    office.say(4, "sweep", "denoising", "z", [7, 2])
    wanted = [{"id": 4, "part": [cell, {"of": ["exact", "denoising", "z", cell]}]} for cell in (7, 2)]
    assert office.contents() == [*wanted, {"id": 4, "answer": {}}]


def test_work_is_stopped_between_two_steps_and_the_kernel_hears_it_meanwhile(office):
    office.waits = {"reached": threading.Event(), "go": threading.Event()}
    office.say(5, "long")
    assert office.waits["reached"].wait(10)
    office.desk.receive({"stop": 5})
    office.waits["go"].set()
    contents = office.contents()
    assert contents[-1] == {"id": 5, "stopped": True}
    assert {"id": 5, "progress": 0} in contents
    assert len(contents) < 5
    office.say(6, "next")
    assert office.contents()[-1] == {"id": 6, "answer": {"of": ["next"]}}


def test_a_sweep_that_is_stopped_keeps_what_it_has(office):
    held = office.ask
    office.desk.ask = lambda *question, tick=None: (office.desk.receive({"stop": 7}) if question[-1] == 2 else None, held(*question))[1]
    office.say(7, "sweep", "denoising", "z", [1, 2, 3, 4])
    contents = office.contents()
    assert [content["part"][0] for content in contents[:-1]] == [1, 2]
    assert contents[-1] == {"id": 7, "stopped": True}


def test_without_anywidget_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "anywidget", None)
    monkeypatch.setattr("patchlab.explorer.widget.find_spec", lambda name: None)
    with pytest.raises(OutputError, match=r"pip install 'patchlab\[notebooks\]'.*save_html\(path\) writes it as a page without"):
        widget_of(dict, lambda *question: {})
    assert "anywidget" in str(missing())
