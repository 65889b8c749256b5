"""A plugin of pytest: a line in the file $KD_TEST_LINES for each test as it ends; what has one from before
$KD_TEST_SINCE is left out."""

import os
import sys

from .log import Log

_in_worker = False


def pytest_configure(config):
    global _in_worker
    _in_worker = hasattr(config, "workerinput")


def pytest_collection_modifyitems(config, items):
    """The same for all processes of a run, also for one that takes the place of another: so only what was
    there when it began counts."""
    since = float(os.environ["KD_TEST_SINCE"])
    done = {key for key, x in Log(os.environ["KD_TEST_LINES"]).outcomes().items() if x["at"] < since}
    left_out = [x for x in items if f"test {x.nodeid}" in done]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [x for x in items if f"test {x.nodeid}" not in done]


def pytest_runtest_logreport(report):
    """In pytest-xdist's first process this hears of the tests of all others, and of those that took their
    process along."""
    if _in_worker or (report.when != "call" and report.passed):
        return
    log = Log(os.environ["KD_TEST_LINES"])
    log.stream = sys.stderr if report.failed else None
    more = (
        {"error": str(report.longrepr).strip().splitlines()[-1][-300:]}
        if report.failed and report.longrepr
        else {}
    )
    log.write(f"test {report.nodeid}", outcome=report.outcome, seconds=round(report.duration, 2), **more)
