"""A process that works on a study beside the command that started it (`python -m rankwise.worker`).

Orders come on its standard input and what it tells leaves on its standard output, one JSON object a line.
When the input ends it ends at once, in the middle of whatever it does: that is how the command stops it, and
how it notices that the command is gone, be it killed. A run that is cut off so goes on from its checkpoint.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.errors import RankwiseError
from rankwise.observer import Observer

if TYPE_CHECKING:
    from rankwise.grid import Planned, Study

Tell = Callable[..., None]
Orders = queue.Queue[dict[str, Any]]


def main() -> None:
    """Obey orders until there are none. PyTorch is loaded after the orders are listened to."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches every process: one must decide
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no message

    def tell(event: str, **about: Any) -> None:
        try:
            channel.write(json.dumps({"event": event, **about}) + "\n")
            channel.flush()
        except OSError:
            os._exit(0)  # nobody listens any more

    orders: Orders = queue.Queue()
    threading.Thread(target=_listen, args=(orders,), daemon=True).start()
    code = 0
    try:
        _obey(orders, tell)
    except RankwiseError as error:
        tell("fault", text=str(error))
        code = 2
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)  # the thread that listens would hold up an ordinary end


def _listen(orders: Orders) -> None:
    with os.fdopen(0, "rb", closefd=False) as lines:
        for line in lines:
            orders.put(json.loads(line))
    os._exit(0)


def _obey(orders: Orders, tell: Tell) -> None:
    """Open the study, take part in measurements, and work through what is pending."""
    from rankwise import execution, speed
    from rankwise.study import open_study, work_through

    order = orders.get()
    study = open_study(Path(order["path"]), Path(order["results"]), tuple(order["overrides"]))
    if identity(study) != order["identity"]:
        raise RankwiseError(
            f"{order['path']}, its model or its rows changed while the study was being opened."
        )
    tell("open")
    while True:
        order = orders.get()
        study = execution.with_threads(study, order["threads"])
        if order["do"] == "work":
            settings = {name: order[name] for name in ("checkpoint_seconds", "retry_failed")}
            work_through(replace(study, only=tuple(order["arms"])), Reporter(tell), **settings)
            return

        def steps(rate: float) -> int:
            tell("warm")
            return orders.get()["steps"]

        tell("speed", **asdict(speed.measure(study, unpacked(order["run"]), steps)))


def identity(study: Study) -> str:
    """Return a name of all that two processes must agree on to work on the same runs."""
    from rankwise.config import digest

    context = study.context
    parts = [context.base.fingerprint, context.prepared.fingerprint, context.dtype, context.engine.name]
    return digest([study.config.model_dump(mode="json"), *parts])


def packed(planned: Planned) -> dict[str, Any]:
    """Return a run and its place as JSON."""
    place = {"arm": planned.arm, "role": planned.role, "seed": planned.seed, "rate": planned.rate}
    return place | {"run": planned.run.model_dump(mode="json")}


def unpacked(found: dict[str, Any]) -> Planned:
    """Return what `packed` packed."""
    from rankwise.grid import Planned
    from rankwise.runconfig import RunConfig

    return Planned(**{**found, "run": RunConfig.model_validate(found["run"])})


class Reporter(Observer):
    """Tells the command how this process's runs go."""

    def __init__(self, tell: Tell) -> None:
        self.tell = tell

    def started(self, planned: Planned, work: int) -> None:
        """Tell that a run begins."""
        self.tell("started", run=packed(planned), work=work)

    def work(self, planned: Planned, units: int) -> None:
        """Tell how much more of the run is done."""
        self.tell("work", run=packed(planned), units=units)

    def finished(self, planned: Planned, status: str) -> None:
        """Tell that a run has ended."""
        self.tell("finished", run=packed(planned), status=status)


if __name__ == "__main__":
    main()
