"""One of several processes of a run, each with a card in NVML's place: prints, as JSON, when its run began, when and to
what error it takes the first one's to have begun, and what it makes of all their samples."""

import argparse
import json
import sys
import time

import pynvml

from jaxinfer.cluster.cpu import use_virtual_devices
from jaxinfer.cluster.distributed import start
from jaxinfer.cluster.launch import find_launch
from jaxinfer.cluster.pulse import Alone
from jaxinfer.process import monitor
from jaxinfer.process.run import Run
from jaxinfer.telemetry.gpus import own_gpus
from nvml_card import Card


def main():
    output, coordinator, count, index, lacks = sys.argv[1:]
    launch = find_launch({}, coordinator, int(count), int(index))
    use_virtual_devices(1)
    start(launch)
    pynvml._LoadNvmlLibrary, pynvml._nvmlGetFunctionPointer = lambda: None, Card(lacks=[lacks]).function
    monitor.on_cpu, monitor.gpus_on = lambda: False, lambda mesh: own_gpus([0], None) or [None]
    args = argparse.Namespace(output=output, monitor="auto", mesh=f"stage={count}")
    run = Run("jaxinfer.generate", args, Alone(20.0), launch)
    zero, error = monitor.run_zero(run.phases.began)
    with monitor.watching(run) as watch:
        began = time.perf_counter()
        time.sleep(2.2)  # less is too short for an energy
        found = monitor.end_watch(run, watch, (began, time.perf_counter()), 8)
    print(json.dumps({"began": run.phases.began, "zero": zero, "error": error, **found}), flush=True)


main()
