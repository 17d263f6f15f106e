"""A gang that loses a member with its node, and logs that can't be read, as theirs can't: neither hides how the gang stands."""

from __future__ import annotations

import datetime
from types import SimpleNamespace
from typing import Any

import pytest
from gang_parts import DONE, FAILED, KEY, Api, member, operator, there

from forja.errors import Unavailable
from forja.kube import ApiError
from forja_airflow.gang import jobset as gang_jobset
from forja_airflow.gang import trigger as gang_trigger


class Mute(Api):
    """An API server that can't read logs, as of a pod whose node is lost; ``asked`` has what came first, too."""

    def __init__(self, error: Exception | None = None, **answers: Any) -> None:
        super().__init__(**answers)
        self.error = error or Unavailable("the Kubernetes API doesn't answer")

    def request(self, method: str, path: str, body: Any = None, *, query: Any = None) -> None:
        if not path.endswith("/log"):
            return super().request(method, path, body)
        self.asked.append(f"log of {path.split('/')[-2]}")
        raise self.error

    def delete(self, kind: str, name: str, namespace: str, *, grace_s: int) -> None:
        self.asked.append(f"DELETE {namespace}/{name} within {grace_s} s")


def made() -> gang_trigger.GangTrigger:
    return gang_trigger.GangTrigger("kubernetes_default", "forja-vision", "digits-0123456789", "u1", 60, 0.0)


def look(api: Api, monkeypatch: pytest.MonkeyPatch) -> str:
    """What one look finds to tell; empty for nothing."""
    monkeypatch.setattr(gang_trigger.clusters, "connect", lambda _: api)
    return made()._look()[0]


def until(pod: Any, seconds: float) -> Any:
    """The pod, which had to end so many seconds ago."""
    moment = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=seconds)
    return {**pod, "metadata": {**pod["metadata"], "deletionTimestamp": moment.isoformat()}}


def test_a_member_that_is_lost_with_its_node_is_deleted_by_force(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything else: its log is what nobody can read now."""
    pods = [until(member(0), 61), until(member(1), 61), until(member(2, code=143), 61), until(member(3), 59)]
    api = Mute(there=there(), Pod=pods)
    assert look(api, monkeypatch) == ""
    assert api.asked == ["DELETE forja-vision/m-0 within 0 s", "DELETE forja-vision/m-1 within 0 s", "log of m-0"]


BLIND = [
    ApiError("GET", 500, "InternalError", "dial tcp: i/o timeout"),
    Unavailable("the Kubernetes API doesn't answer GET log"),
    ApiError("GET", 403, "Forbidden", "cannot get resource pods/log"),
    ApiError("GET", 404, "NotFound", "pods m-0 not found"),
]


@pytest.mark.parametrize(
    ("status", "pods", "told"),
    [(DONE, [member(0)], "completed"), (FAILED, [member(0)], "failed"), ({}, [member(0, waiting="InvalidImageName")], "held up")],
    ids=["completed", "failed", "held up"],
)
@pytest.mark.parametrize("error", BLIND, ids=["500", "time-out", "403", "404"])
def test_a_log_that_cannot_be_read_hides_nothing(
    error: Exception, status: Any, pods: Any, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert look(Mute(error, there=there(status=status), Pod=pods), monkeypatch) == told


def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What triggers will have written to the task's log; warnings with ``!``."""
    lines: list[str] = []

    def write(sign: str) -> Any:
        return lambda text, *words: lines.append(sign + text % words)

    monkeypatch.setattr(gang_trigger.GangTrigger, "log", SimpleNamespace(info=write(""), warning=write("! ")))
    return lines


def follow(answers: list[Any], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What member 0's log becomes in the task's, when the reads of it give these texts or errors one after the other."""

    def request(*_: Any, query: Any) -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    lines, kube, trigger = said(monkeypatch), SimpleNamespace(request=request), made()
    while answers:
        trigger._follow(kube, member(0))  # type: ignore[arg-type]
    return lines


AT = "2026-01-01T00:00:0{}Z "


def test_a_log_that_cannot_be_read_is_told_once_and_read_the_next_time(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = AT.format(1) + "one", AT.format(2) + "two"
    lines = follow([BLIND[0], BLIND[1], first, BLIND[3], first + "\n" + second, BLIND[0]], monkeypatch)
    assert [line.partition(":")[0] for line in lines] == [
        "! the log of pod m-0 can't be read now", "one", "two", "! the log of pod m-0 can't be read now",
    ]  # fmt: skip


def test_a_line_of_a_log_ends_where_the_cluster_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Progress bars go back to the line's begin, and other characters may look like an end: only a whole line has its time."""
    text = f"{AT.format(1)}10 %\r100 %\n{AT.format(2)}a\x0cb\u2028c\r\n{AT.format(3)}\ufffd\n"
    assert follow([text], monkeypatch) == ["10 %\r100 %", "a\x0cb\u2028c", "\ufffd"]


def test_a_gang_that_is_being_removed_loses_its_lost_members_by_force(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is gone only after all of its pods, and nobody but this try looks at them by then."""
    api: Any = Mute(there=there(deletionTimestamp="2026-01-01T00:00:00Z"), Pod=[until(member(0), 61), until(member(1), 59)])
    forced, said = list[str](), list[str]()

    def delete(kind: str, name: str, namespace: str, *, grace_s: int) -> None:
        forced.append(f"{kind} {namespace}/{name} within {grace_s} s")
        api.answers.pop("there")

    monkeypatch.setattr(api, "delete", delete)
    made, how = gang_jobset.submit(api, operator().jobset(KEY), patience_s=5, say=said.append)
    assert (made["metadata"]["name"], how) == ("digits-0123456789", "")
    assert forced == ["Pod forja-vision/m-0 within 0 s"]
    assert said == ["pod m-0 is lost with its node and deleted by force"]
