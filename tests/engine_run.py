"""Runs the engine to the end on given prompts: shared by the engine's tests and by their worker processes."""

from jaxinfer.engine.config import EngineConfig
from jaxinfer.engine.engine import Engine
from jaxinfer.engine.params import SamplingParams
from jaxinfer.engine.request import Output, Request
from jaxinfer.parallel.axes import parse_mesh


def make_engine(checkpoint, mesh: str = "", **settings) -> Engine:
    # small programs compile fast; none of these settings may change a token
    settings = {"dtype": "float32", "max_batch": 4, "prefill_chunk": 32, "decode_steps": 4} | settings
    return Engine(checkpoint, EngineConfig(mesh=parse_mesh(mesh), **settings))


def finish(engine: Engine) -> dict[tuple[str, int], Output]:
    """Steps until nothing is left; checks that the updates add up to the outputs (or to their ends)."""
    outputs, streamed = {}, {}
    while engine.has_unfinished():
        for update in engine.step():
            key = update.request_id, update.index
            streamed.setdefault(key, []).append(update)
            if update.output is not None:
                assert key not in outputs, f"{key} finished twice"
                outputs[key] = update.output
    for key, output in outputs.items():
        assert output.text.endswith("".join(update.text for update in streamed[key]))
        if output.finish_reason != "stop":  # a stop string takes back tokens that were streamed before
            last = [token for update in streamed[key] for token in update.token_ids]
            assert output.token_ids[len(output.token_ids) - len(last) :] == last
    return outputs


def run(engine: Engine, prompts: dict[str, list[int]], params) -> dict[tuple[str, int], Output]:
    """`params`: one for all, or by request id."""
    for name, prompt in prompts.items():
        own = params if isinstance(params, SamplingParams) else params[name]
        engine.add(Request(name, prompt, own))
    return finish(engine)


def tokens(outputs: dict[tuple[str, int], Output]) -> dict[tuple[str, int], list[int]]:
    return {key: output.token_ids for key, output in sorted(outputs.items())}
