"""What answers of probes say together: a refusal for another reason, a failed probe or a silent target is never a pass."""

from __future__ import annotations

import errno
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from forja.baseline import agent
from forja.baseline.probes import Answer, Outcome, Probe, Verdict, judge, worst

DONE, NO, ERRED = Outcome.SUCCEEDED, Outcome.REFUSED, Outcome.ERRED

REASON = r'violates PodSecurity "restricted:'
OURS = 'pods "x" is forbidden: violates PodSecurity "restricted:v1.36": hostPort'
OTHER = "pods is forbidden: User probe cannot create resource pods"

CASES = {
    # must be refused: its answer, the twin's answer, verdict
    "refused, twin got through": (True, (NO, OURS), DONE, Verdict.PASS),
    "got through": (True, (DONE, "accepted"), DONE, Verdict.FAIL),
    "got through, whatever the twin": (True, (DONE, "accepted"), NO, Verdict.FAIL),
    "refused by rights": (True, (NO, OTHER), DONE, Verdict.NOT_PROVEN),
    "refused like its twin": (True, (NO, OURS), NO, Verdict.NOT_PROVEN),
    "refused, twin failed": (True, (NO, OURS), ERRED, Verdict.NOT_PROVEN),
    "refused, twin never called": (True, (NO, OURS), None, Verdict.NOT_PROVEN),
    "failed with the right words": (True, (ERRED, OURS), DONE, Verdict.NOT_PROVEN),
    "never called": (True, None, DONE, Verdict.NOT_PROVEN),
    # must succeed
    "succeeded": (False, (DONE, "accepted"), None, Verdict.PASS),
    "refused by the control, witness got through": (False, (NO, OURS), DONE, Verdict.FAIL),
    "refused by the control, and so was the witness": (False, (NO, OURS), NO, Verdict.NOT_PROVEN),
    "refused for another reason": (False, (NO, OTHER), DONE, Verdict.NOT_PROVEN),
    "failed": (False, (ERRED, "500"), DONE, Verdict.NOT_PROVEN),
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_verdicts(case: str) -> None:
    refused, mine, twin, verdict = CASES[case]
    probe = Probe(team="t", control="pod-security", name="x", refused=refused, reason=REASON, witnesses=("twin",))
    answers = {}
    if mine:
        answers["x"] = Answer(outcome=mine[0], said=mine[1])
    if twin:
        answers["twin"] = Answer(outcome=twin, said="")
    assert judge(probe, answers).verdict is verdict


@pytest.mark.parametrize(("seen", "verdict"), [((DONE, ERRED), Verdict.PASS), ((NO, ERRED), Verdict.NOT_PROVEN)])
def test_one_witness_is_enough(seen: tuple[Outcome, ...], verdict: Verdict) -> None:
    probe = Probe(team="t", control="network", name="x", refused=True, reason="no answer", witnesses=("0", "1"))
    answers = {str(n): Answer(outcome=o, said="") for n, o in enumerate(seen)} | {"x": Answer(outcome=NO, said="no answer")}
    assert judge(probe, answers).verdict is verdict


@pytest.mark.parametrize(("path", "verdict"), [(DONE, Verdict.PASS), (NO, Verdict.NOT_PROVEN), (None, Verdict.NOT_PROVEN)])
def test_a_target_that_is_up_is_not_yet_a_path_that_works(path: Outcome | None, verdict: Verdict) -> None:
    probe = Probe(team="t", control="network", name="x", refused=True, reason="no answer", witnesses=("up",), also=("path",))
    answers = {"x": Answer(outcome=NO, said="no answer"), "up": Answer(outcome=DONE, said="ready")}
    if path:
        answers["path"] = Answer(outcome=path, said="")
    assert judge(probe, answers).verdict is verdict


def test_a_probe_that_looks_says_itself_what_is_wrong() -> None:
    probe = Probe(team="t", control="network", name="x", refused=False, reason="differs", wrong="look at them")
    assert judge(probe, {"x": Answer(outcome=NO, said="differs: y")}).why == "look at them"
    assert judge(probe, {"x": Answer(outcome=DONE, said="the same")}).why == "it is as it must be"


@pytest.mark.parametrize(
    ("verdicts", "together"),
    [
        ((), Verdict.NOT_PROVEN),
        ((Verdict.PASS, Verdict.PASS), Verdict.PASS),
        ((Verdict.PASS, Verdict.NOT_PROVEN), Verdict.NOT_PROVEN),
        ((Verdict.NOT_PROVEN, Verdict.FAIL, Verdict.PASS), Verdict.FAIL),
    ],
)
def test_worst_verdict_counts(verdicts: tuple[Verdict, ...], together: Verdict) -> None:
    assert worst(verdicts) is together


@pytest.fixture
def port() -> Iterator[int]:
    """A port of 127.0.0.1 where connections are accepted."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def silent() -> Iterator[int]:
    """A port whose queue is full: packets to it are dropped, as a network policy drops them."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server:
        address = server.getsockname()
        held = []
        for _ in range(3):
            client = socket.socket()
            client.setblocking(False)
            client.connect_ex(address)
            held.append(client)
        yield address[1]
        for client in held:
            client.close()


def test_agent_tells_accepted_from_silent_from_closed(port: int, silent: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        closed = gone.getsockname()[1]
    message = tmp_path / "message"
    monkeypatch.setenv("FORJA_MESSAGE", str(message))
    monkeypatch.setattr(agent, "CONNECT_S", 0.3)
    calls = {
        "open": ["127.0.0.1", port, "succeeded"],
        "open, though it must not be": ["127.0.0.1", port, "refused"],
        "silent": ["127.0.0.1", silent, "refused"],
        "closed": ["127.0.0.1", closed, "refused"],
        "no name": ["nowhere.invalid", 1, "refused"],
        "a name": ["localhost", 0, "succeeded"],
    }
    agent.main({"calls": calls, "patience_s": 0.5})
    told = json.loads(message.read_text())
    assert "no answer" in told["silent"][1]
    assert "rejected" in told["closed"][1], "an enforcer that rejects looks like this; whether it was one, the witness shows"
    found = {name: outcome for name, (outcome, _) in told.items()}
    assert found == {
        "open": "succeeded", "open, though it must not be": "succeeded", "silent": "refused", "closed": "refused", "no name": "erred",
        "a name": "succeeded",
    }  # fmt: skip


@pytest.mark.parametrize("number", [errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.EACCES])
def test_agent_tells_what_rejects_by_its_error(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "create_connection", lambda *_: (_ for _ in ()).throw(OSError(number, "said so")))
    assert agent.connect("127.0.0.1", 1) == ("refused", "127.0.0.1:1: rejected, said so")


def test_agent_takes_no_other_error_for_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "create_connection", lambda *_: (_ for _ in ()).throw(OSError(errno.EMFILE, "too many")))
    assert agent.connect("127.0.0.1", 1)[0] == "erred"


def test_agent_wants_a_refusal_to_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """One dropped packet may only mean that the rules for a new pod are still being written."""
    seen = iter(["refused", "succeeded", "refused", "refused", "succeeded"])
    monkeypatch.setattr(agent, "connect", lambda host, port: (next(seen), "seen"))
    assert agent.call("host", 1, "refused", 60) == ("refused", "seen, after 1 that came out otherwise")
    assert next(seen) == "succeeded", "it stopped after two in a row"


def test_agent_listens_where_it_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    threading.Thread(target=agent.listen, args=([port],), daemon=True).start()
    assert agent.call("127.0.0.1", port, "succeeded", 10)[0] == "succeeded"


def test_agent_opens_its_first_port_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kubelet asks the first: once it is ready, the others listen too, so that a rejection there is no closed port."""
    opened: list[int] = []

    class NoThread:
        def __init__(self, **_: object) -> None:
            """Never accepts."""

        def start(self) -> None:
            """Does nothing."""

        join = start

    monkeypatch.setattr(threading, "Thread", NoThread)
    monkeypatch.setattr(socket, "create_server", lambda address, backlog: opened.append(address[1]))
    agent.listen([8000, 9999])
    assert opened == [9999, 8000]
