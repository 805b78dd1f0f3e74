"""The network below the collectives: InfiniBand devices of a node, and what NCCL says that it uses."""

import re
from collections import Counter
from pathlib import Path

import attrs


@attrs.frozen
class Port:
    """A port of an InfiniBand (or RoCE) device."""

    device: str
    number: int
    active: bool
    rate: str
    layer: str

    @property
    def name(self) -> str:
        return f"{self.device}:{self.number} {self.layer} {self.rate}"


def infiniband_ports(root: Path = Path("/sys/class/infiniband")) -> list[Port]:
    """The ports of this node that the kernel knows; in a container they are seen even where they cannot be used."""
    found = []
    for folder in sorted(root.glob("*/ports/*")):
        try:
            state, rate, layer = ((folder / name).read_text().strip() for name in ("state", "rate", "link_layer"))
        except OSError:
            continue
        found.append(
            Port(folder.parent.parent.name, int(folder.name), "ACTIVE" in state, rate.partition(" (")[0], layer)
        )
    return found


@attrs.define
class Nccl:
    """What one or more of NCCL's logs (NCCL_DEBUG=INFO) say.

    Attributes:
      version: as ``2.27.5+cuda12.9``.
      network: what it would use between nodes: IB, Socket, or a plugin's name.
      devices: InfiniBand devices, as ``mlx5_0:1/IB``; interfaces: for sockets, as ``eth0``.
      nodes, ranks: of the largest communicator.
      links: how many connections of which kind: P2P, SHM, NET/IB, NET/Socket, ...
      direct: connections of a network that reach into GPU memory (GDRDMA).
      nvls: multicast over NVLink: True where it can be used, False where not; nvls_channels: how many use it.
      no_library: libibverbs could not be loaded; no_device: no InfiniBand device was usable.
      settings: NCCL variables that it took from the environment or a file.
      warnings: its own warnings.
    """

    version: str = ""
    network: str = ""
    devices: tuple[str, ...] = ()
    interfaces: tuple[str, ...] = ()
    nodes: int = 0
    ranks: int = 0
    links: Counter[str] = attrs.field(factory=Counter)
    direct: int = 0
    nvls: bool | None = None
    nvls_channels: int = 0
    no_library: bool = False
    no_device: bool = False
    settings: dict[str, str] = attrs.field(factory=dict)
    warnings: list[str] = attrs.field(factory=list)


def parse_nccl(text: str) -> Nccl:
    """Reads NCCL's log lines (seen of NCCL 2.18 to 2.28); what is no line of NCCL's is passed over."""
    found = Nccl()
    for line in text.splitlines():
        if message := re.search(r"NCCL WARN (.*)", line):
            found.warnings.append(message[1].strip())
            _warning(found, message[1])
        elif message := re.search(r"NCCL (?:INFO )?(.*)", line):
            _info(found, message[1].strip())
    found.warnings = list(dict.fromkeys(found.warnings))
    return found


def _warning(found: Nccl, text: str) -> None:
    if "libibverbs" in text:
        found.no_library = True


def _info(found: Nccl, text: str) -> None:
    if link := re.match(r"Channel \d+(?:/\d+)? : .* via ([\w ]+)(?:/([\w ]+))?(.*)", text):
        # P2P and SHM are followed by how, a network by its name and device
        kind = f"NET/{link[2]}" if link[1] == "NET" else link[1].strip()
        found.links[kind] += 1
        found.direct += "GDRDMA" in link[3]
    elif network := re.match(r"(?:Using network|Initialized NET plugin) (.+)", text):
        found.network = network[1].strip()
    elif devices := re.match(r"NET/IB ?: Using (.*)", text):
        found.devices = tuple(re.findall(r"\[\d+\](\S+)", devices[1]))
    elif interfaces := re.match(r"NET/Socket ?: Using (.*)", text):
        found.interfaces = tuple(name.partition(":")[0] for name in re.findall(r"\[\d+\](\S+)", interfaces[1]))
    elif re.match(r"NET/IB ?: No device found", text):
        found.no_device = True
    elif "Failed to open libibverbs" in text:
        found.no_library = True
    elif multicast := re.match(r"NVLS multicast support is (not )?available", text):
        found.nvls = multicast[1] is None
    elif channels := re.search(r"(\d+) nvls channels", text):
        found.nvls_channels = max(found.nvls_channels, int(channels[1]))
    elif setting := re.match(r"(NCCL_\w+) set (?:by environment )?to (.*?)\.?$", text):
        found.settings[setting[1]] = setting[2]
    elif version := re.match(r"(?:NCCL )?version (\S+)", text):
        found.version = version[1]
    if size := re.search(r"nRanks (\d+) nNodes (\d+)", text):
        found.ranks, found.nodes = max(found.ranks, int(size[1])), max(found.nodes, int(size[2]))
