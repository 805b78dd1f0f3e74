"""Datasheet memory bandwidth of GPUs, by the name that the driver gives them."""

# (words that all occur in the device kind, GB/s); the first that fits counts
_BANDWIDTH = (
    (("B200",), 8000),
    (("GH200", "144G"), 4900),
    (("GH200",), 4000),
    (("H200",), 4800),
    (("H100", "NVL"), 3938),
    (("H100", "PCIe"), 2000),
    (("H100",), 3350),
    (("H20",), 4000),
    (("A100", "80GB", "PCIe"), 1935),
    (("A100", "80GB"), 2039),
    (("A100",), 1555),
    (("A30",), 933),
    (("A40",), 696),
    (("A10G",), 600),
    (("A10",), 600),
    (("L40",), 864),
    (("L4",), 300),
    (("RTX 4090",), 1008),
    (("RTX 3090",), 936),
    (("V100S",), 1134),
    (("V100",), 900),
    (("P100",), 732),
    (("T4",), 320),
)


def memory_bandwidth(device_kind: str) -> float | None:
    """Bytes per second that the datasheet gives for ``jax.Device.device_kind``; None where it is not known."""
    parts = device_kind.replace("-", " ").split()
    for words, gigabytes in _BANDWIDTH:
        if all(_occurs(word, parts, device_kind) for word in words):
            return gigabytes * 1e9
    return None


def _occurs(word: str, parts: list[str], device_kind: str) -> bool:
    return word in device_kind if " " in word else any(part.startswith(word) for part in parts)
