"""The driver's wish to stop, as another process learns of it."""

from __future__ import annotations

import threading
import time

import job_process as processes
import ray

from llm4msr.training.stop import asking, forwarded, start_flag


def test_a_wish_to_stop_reaches_other_processes(ray_cluster):
    def work(flag, under_way) -> str:
        with asking(flag) as should_stop:
            at_first = should_stop()
            ray.get(under_way.set.remote())
            end = time.monotonic() + 60
            while not should_stop() and time.monotonic() < end:
                time.sleep(0.05)
            return f"{at_first} {should_stop()}"

    stop, flag, under_way = threading.Event(), start_flag(), start_flag()
    with forwarded(stop, flag):
        working = ray.remote(num_cpus=1)(work).remote(flag, under_way)
        processes.wait_until(lambda: ray.get(under_way.get.remote()), 60, "the work")
        assert not ray.get(flag.get.remote())
        stop.set()
        assert ray.get(working, timeout=60) == "False True"
    with asking(flag) as should_stop:
        assert should_stop()  # the first answer is there before anything is done
