"""The Dask cluster that a batch runs on: processes of our own, or workers that run already."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator
from typing import Any

from ..errors import DFKDError, InputError
from . import workers as on_worker

PATIENCE = 6.0  # seconds for a scheduler to answer


def threads_for(workers: int) -> int:
    """Threads for each kernel: the environment's choice, or an even share of the cores."""
    chosen = os.environ.get("OMP_NUM_THREADS", "")
    return int(chosen) if chosen.isdigit() else max(1, cores() // workers)


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def connect(scheduler: str | None, workers: int, gpus: int) -> Iterator[Any]:
    """A client of the scheduler at an address, or of workers of our own that end with it.

    Our own talk through TLS with a certificate that only they have, so that no other user of this machine can hand
    them code, and serve no pages.

    Raises:
        InputError: no scheduler answers at the address, or a worker of it runs several tasks at a time.
        DFKDError: a package is missing.
    """
    try:
        import dask
        from distributed import Client, LocalCluster
        from distributed.security import Security

        security = None if scheduler else Security.temporary()
    except ImportError as e:
        raise DFKDError(f"a batch needs Dask and cryptography ({e}): pip install 'dfkd-lib[batch]'") from e
    import logging

    if scheduler:
        try:
            asyncio.run(asyncio.wait_for(_introduce(scheduler), PATIENCE))
            client = Client(scheduler, timeout=PATIENCE, set_as_default=False)
        except Exception as e:  # whatever else listens there may say anything
            raise InputError(
                f"no Dask scheduler answers at {scheduler} ({type(e).__name__}); start one or correct it"
            ) from e
        with client:
            _check_workers(client.scheduler_info(n_workers=-1)["workers"])
            yield client
        return
    resources = None
    if gpus:
        here = len(on_worker.visible_gpus()) // gpus
        if not here:
            raise InputError(f"the plan needs {gpus} GPU(s) for a point and this machine has none; see --scheduler")
        workers, resources = min(workers, here), {"GPU": gpus}
    settings = {
        # With a saturation of 1 a worker holds no point but the one it runs: no other is blamed for its death.
        "distributed.scheduler.worker-saturation": 1.0,
        "distributed.scheduler.http.routes": [],
        "distributed.worker.http.routes": [],
    }
    with (
        dask.config.set(settings),
        LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            memory_limit=0,  # the kernels are processes of their own
            dashboard_address=None,
            scheduler_kwargs={"dashboard_address": "127.0.0.1:0"},  # which is closed below; any free port will do
            silence_logs=logging.CRITICAL,
            resources=resources,
            preload=on_worker.__name__,
            security=security,
            protocol="tls://",
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        cluster.scheduler.http_server.stop()
        yield client


async def _introduce(address: str) -> None:
    """Ask who listens at an address.

    Raises:
        ValueError: it is no scheduler.
    """
    from distributed.comm import connect as reach
    from distributed.security import Security

    comm = await reach(address, timeout=PATIENCE, **Security().get_connection_args("client"))
    try:
        await comm.write({"op": "identity", "reply": True})
        if (await comm.read())["type"] != "Scheduler":
            raise ValueError(f"{address} is not that of a scheduler")
    finally:
        comm.abort()


def _check_workers(workers: dict[str, Any]) -> None:
    for address, facts in workers.items():
        if facts["nthreads"] > 1:
            raise InputError(
                f"worker {address} would run {facts['nthreads']} points in one process; start it with --nthreads 1"
            )
