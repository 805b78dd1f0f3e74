"""Datasheet memory bandwidth of GPUs, by the name that the driver gives them."""

# (words of the device kind, GB/s); the first that fits counts
_BANDWIDTH = (
    (("B200",), 8000),
    (("GB200",), 8000),
    (("GH200", "144G"), 4900),
    (("GH200",), 4000),
    (("H200",), 4800),
    (("H100", "NVL"), 3938),
    (("H100", "PCIe"), 2000),
    (("H100",), 3350),
    (("H20",), 4000),
    (("A100", "80GB", "PCIe"), 1935),
    (("A100", "80GB"), 2039),
    (("A100", "64GB"), 1640),
    (("A100",), 1555),
    (("A30",), 933),
    (("A40",), 696),
    (("A10G",), 600),
    (("A10",), 600),
    (("L40S",), 864),
    (("L40",), 864),
    (("L4",), 300),
    (("4090",), 1008),
    (("3090",), 936),
    (("V100S",), 1134),
    (("V100",), 900),
    (("P100",), 732),
    (("T4",), 320),
    (("MI250X",), 1638),  # one GCD, which is a device to JAX
)


def memory_bandwidth(device_kind: str) -> float | None:
    """Bytes per second that the datasheet gives for ``jax.Device.device_kind``; None where it is not known."""
    parts = set(device_kind.replace("-", " ").split())
    return next((gigabytes * 1e9 for words, gigabytes in _BANDWIDTH if parts.issuperset(words)), None)
