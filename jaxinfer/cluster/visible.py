"""CUDA_VISIBLE_DEVICES, as CUDA reads it."""

import re
from collections.abc import Mapping


def visible_devices(env: Mapping[str, str]) -> list[str] | None:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves to this process, numbers or (starts of) UUIDs; None where it is unset.

    CUDA takes the entries up to the first that cannot be one (``-1``, ``none``, nothing at all), of a number only the
    digits, and no GPU where one is named twice. Whether a GPU of that number is there is not looked at.
    """
    listed = env.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return None
    names: list[str] = []
    for entry in listed.split(","):
        found = re.match(r"\s*(?:\+?(?P<index>[0-9]+)|(?P<uuid>(?:GPU|MIG)-\S+))", entry)
        # the first entry says whether all are numbers or UUIDs
        if not found or (names and names[0].isdigit() != bool(found["index"])):
            break
        name = found["uuid"] or str(int(found["index"]))
        if name in names:
            return []
        names.append(name)
    return names
