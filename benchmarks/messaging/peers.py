"""The peers of ``benchmarks.messaging.bus``: no-op jobs in one process, as its manual shows.

    python -m benchmarks.messaging.peers NAME URL COUNT

Puts ``COUNT`` jobs in its queue, starts its worker, and prints the seconds from the first job to
the last, as JSON. Polling intervals and concurrency are set generously where the defaults would
bound the rate.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from datetime import timedelta
from typing import Any, NoReturn
from urllib.parse import urlsplit


class Count:
    """Counts jobs; tells how long it took from the first to the last."""

    def __init__(self, whole: int) -> None:
        self.whole, self.done, self.begun = whole, 0, 0.0
        self.seconds = self.cpu = 0.0
        self.over = threading.Event()

    def one(self) -> None:
        """A job was served."""
        if not self.done:
            self.begun, self.cpu = time.perf_counter(), time.process_time()
        self.done += 1
        if self.done == self.whole:
            self.seconds = time.perf_counter() - self.begun
            self.cpu = time.process_time() - self.cpu
            self.over.set()

    async def wait(self) -> NoReturn:
        """Wait for the last one, print the figures, and end the process, whatever still runs."""
        await asyncio.to_thread(self.over.wait)
        print(json.dumps({"seconds": self.seconds, "cpu": self.cpu}), flush=True)
        os._exit(0)


async def faststream(url: str, count: Count) -> None:
    from faststream import AckPolicy
    from faststream.redis import RedisBroker, StreamSub
    from redis.asyncio import Redis

    broker = RedisBroker(url, logger=None)
    stream = StreamSub("jobs", group="g", consumer="c", polling_interval=100, last_id=">")

    @broker.subscriber(stream=stream, ack_policy=AckPolicy.ACK)
    async def job(body: str) -> None:
        count.one()

    async with Redis.from_url(url) as redis:
        await redis.xgroup_create("jobs", "g", "0", mkstream=True)
    async with broker:
        for _ in range(count.whole):
            await broker.publish("x", stream="jobs")
        await broker.start()
        await count.wait()


async def pydocket(url: str, count: Count) -> None:
    from docket import Docket, Worker

    async def job() -> None:
        count.one()

    async with Docket(name="bench", url=url) as docket:
        for _ in range(count.whole):
            await docket.add(job)()
        fast = timedelta(milliseconds=1)
        async with Worker(docket, concurrency=32, minimum_check_interval=fast) as worker:
            await worker.run_until_finished()
            await count.wait()


async def taskiq(url: str, count: Count) -> None:
    from taskiq.api import run_receiver_task
    from taskiq_redis import RedisStreamBroker

    broker = RedisStreamBroker(url, consumer_id="0")

    @broker.task
    async def job() -> None:
        count.one()

    broker.is_worker_process = True
    await broker.startup()
    for _ in range(count.whole):
        await job.kiq()
    serving = asyncio.create_task(run_receiver_task(broker))
    await asyncio.gather(serving, count.wait())


async def arq(url: str, count: Count) -> None:
    from arq import create_pool
    from arq.connections import RedisSettings
    from arq.worker import Worker, func

    async def job(_: object) -> None:
        count.one()

    parts = urlsplit(url)
    settings = RedisSettings(parts.hostname or "", parts.port or 0, password=parts.password)
    pool = await create_pool(settings)
    for _ in range(count.whole):
        await pool.enqueue_job("job")
    functions = [func(job, name="job", keep_result=0)]
    worker = Worker(
        functions, redis_settings=settings, handle_signals=False, poll_delay=0.01, max_jobs=32
    )
    serving = asyncio.create_task(worker.async_run())
    await asyncio.gather(serving, count.wait())


async def dramatiq(url: str, count: Count) -> None:
    import dramatiq as library
    from dramatiq.brokers.redis import RedisBroker

    broker = RedisBroker(url=url)
    library.set_broker(broker)
    lock = threading.Lock()

    @library.actor
    def job() -> None:
        with lock:
            count.one()

    for _ in range(count.whole):
        job.send()
    worker = library.Worker(broker, worker_threads=8)
    worker.start()
    await count.wait()


PEERS: dict[str, Callable[[str, Count], Coroutine[Any, Any, None]]] = {
    "faststream": faststream,
    "pydocket": pydocket,
    "taskiq-redis": taskiq,
    "arq": arq,
    "dramatiq": dramatiq,
}


def main() -> None:
    """Run one peer."""
    name, url, whole = sys.argv[1], sys.argv[2], int(sys.argv[3])
    count = Count(whole)
    asyncio.run(PEERS[name](url, count))


if __name__ == "__main__":
    main()
