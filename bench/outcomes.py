"""
A plugin of pytest, `-p bench.outcomes --outcomes FILE`: one line of JSON per test, written as soon as it has ended, so
that a run that is killed leaves what it found. With pytest-xdist, a process whose device no longer answers ends, and a
fresh one goes on: without that, every later test of that process would fail for the one that broke it.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import pytest

LOST = 3  # exit code of a process whose device is lost


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, metavar="FILE", help="a line of JSON per test, as it ends")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--outcomes")
    if hasattr(config, "workerinput"):  # a process of xdist: what it finds is written where all reports arrive
        config.pluginmanager.register(_Worker())
    elif path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        config.pluginmanager.register(_Lines(path.open("w")))


class _Lines:
    def __init__(self, file: TextIO):
        self.file = file

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return  # a fixture that worked
        line: dict[str, Any] = {
            "test": report.nodeid,
            "outcome": report.outcome,
            "seconds": round(report.duration, 3),
            "worker": getattr(report, "worker_id", None),
        }
        if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
            line["reason"] = report.longrepr[2]
        elif report.outcome == "failed":
            line["reason"] = report.longreprtext[-2000:]
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()


class _Worker:
    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_logfinish(self) -> Iterator[None]:
        yield
        if device_is_lost():
            os._exit(LOST)


def device_is_lost() -> bool:
    torch = sys.modules.get("torch")  # imported by whoever uses a device
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:  # such an error stays with its process
        return True
    return False
