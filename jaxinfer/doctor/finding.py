"""What a check found."""

import threading
from collections.abc import Callable, Iterable
from typing import Any

import attrs

OK, WARNING, ERROR = "ok", "warning", "error"


@attrs.frozen
class Finding:
    """One line for the user: `level` is ok, warning or error, `fix` what to do."""

    level: str
    name: str
    text: str
    fix: str = ""


def ok(name: str, text: str, fix: str = "") -> Finding:
    return Finding(OK, name, text, fix)


def warning(name: str, text: str, fix: str) -> Finding:
    return Finding(WARNING, name, text, fix)


def error(name: str, text: str, fix: str) -> Finding:
    return Finding(ERROR, name, text, fix)


@attrs.define
class Report:
    """What one rank found: `facts` for the table and for comparing ranks, `findings` for the user. JSON holds it."""

    rank: int
    host: str
    facts: dict[str, Any] = attrs.field(factory=dict)
    findings: list[Finding] = attrs.field(factory=list)

    @property
    def name(self) -> str:
        return f"rank {self.rank} on {self.host}"

    def add(self, findings: Iterable[Finding], **facts: Any) -> None:
        self.findings += findings
        self.facts |= facts

    def to_json(self) -> dict[str, Any]:
        return attrs.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Report":
        return cls(data["rank"], data["host"], data["facts"], [Finding(**each) for each in data["findings"]])


Check = Callable[[], tuple[list[Finding], dict[str, Any]]]


def bounded(report: Report, name: str, check: Check, seconds: float) -> None:
    """Adds what `check` returns to the report, or that it failed or did not return: a hung file system or driver must
    not hang the doctor."""
    done: list[tuple[list[Finding], dict[str, Any]]] = []

    def run() -> None:
        try:
            done.append(check())
        except Exception as problem:
            text = f"the check failed: {type(problem).__name__}: {problem}"
            done.append(([error(name, text, "what it says is the cause; it may also be a fault of the doctor")], {}))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(max(seconds, 0.0))
    if done:
        report.add(done[0][0], **done[0][1])
    else:
        text = "the check did not return in time"
        report.add([error(name, text, "a file system or driver that hangs: look at `dmesg` and `df` on that node")])
