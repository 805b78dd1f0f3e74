"""One of several processes that agree on a clock: prints when its run began and when it takes the first one's to have
begun, as JSON."""

import json
import sys
import time

from jaxinfer.cluster.cpu import use_virtual_devices
from jaxinfer.cluster.distributed import start
from jaxinfer.cluster.launch import find_launch


def main():
    began = time.perf_counter()
    coordinator, count, index = sys.argv[1:]
    use_virtual_devices(1)
    start(find_launch({}, coordinator, int(count), int(index)))
    from jaxinfer.process.monitor import run_zero

    print(json.dumps([began, *run_zero(began)]), flush=True)


main()
