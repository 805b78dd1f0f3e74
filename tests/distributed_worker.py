"""One of several processes that run the engine together: prints its tokens and what it read, as JSON."""

import json
import sys

from jaxinfer.cluster.cpu import use_virtual_devices
from jaxinfer.cluster.distributed import start
from jaxinfer.cluster.launch import find_launch


def main():
    checkpoint, coordinator, count, index, devices, mesh = sys.argv[1:]
    use_virtual_devices(int(devices))
    start(find_launch({}, coordinator, int(count), int(index)))
    from engine_run import make_engine, run, tokens
    from jaxinfer.engine.params import SamplingParams

    engine = make_engine(checkpoint, mesh)
    prompts = {str(length): [3 + (7 * i) % 90 for i in range(length)] for length in (1, 20, 45)}
    params = {
        "1": SamplingParams(max_new_tokens=12, ignore_eos=True),
        "20": SamplingParams(max_new_tokens=12, ignore_eos=True, temperature=0.9, seed=1),
        "45": SamplingParams(max_new_tokens=12, ignore_eos=True, repetition_penalty=1.3),
    }
    found = tokens(run(engine, prompts, params))
    print(json.dumps({"tokens": list(found.values()), "read": engine.stats.load_bytes}), flush=True)


main()
