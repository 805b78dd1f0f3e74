"""One look at one GPU through NVML. A card or driver that cannot answer a question is not asked it again."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pynvml

from jaxinfer.telemetry.counter import Counter

ERRORS = (pynvml.NVMLError, AttributeError, UnicodeDecodeError, ValueError, OSError)
ALL_LINKS = 0xFFFFFFFF  # the scope of a field that is the sum over them
# the type (nvmlValueType_t) of 32 bits: a counter of bytes wraps around each 4 GiB, so that looks 0.1 s apart tell
# rates of up to 43 GB/s (an H200's PCIe counters are such)
UNSIGNED_INT = 1
MEMBERS = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")  # of nvmlValue_t, by that type
SLOW_EVERY = 10  # looks, for questions that take the driver long, or whose answers hardly change


class Field(NamedTuple):
    """A value of nvmlDeviceGetFieldValues, which answers many in one call; `factor` makes the unit of its name."""

    name: str
    field: int
    factor: float
    scope: int = 0


# by their numbers in nvml.h, since pynvml has names only for those of its day. Of several with one name, the first that
# the card answers
FIELDS = (
    Field("power_w", 186, 1e-3),  # POWER_INSTANT
    Field("energy_j", 83, 1e-3),  # TOTAL_ENERGY_CONSUMPTION
    Field("pcie_tx_bytes", 197, 1),  # PCIE_COUNT_TX_BYTES
    Field("pcie_rx_bytes", 198, 1),
    Field("nvlink_tx_bytes", 138, 1024, ALL_LINKS),  # NVLINK_THROUGHPUT_DATA_TX
    Field("nvlink_rx_bytes", 139, 1024, ALL_LINKS),
    Field("nvlink_tx_bytes", 202, 1, ALL_LINKS),  # NVLINK_COUNT_XMIT_BYTES, of NVLink 5: all bytes, not the data alone
    Field("nvlink_rx_bytes", 204, 1, ALL_LINKS),
)
TRAFFIC = ("pcie_tx_bytes", "pcie_rx_bytes", "nvlink_tx_bytes", "nvlink_rx_bytes")
COUNTERS = (*TRAFFIC, "energy_j")

# but for idleness, which is no reason to call throttling
REASONS = {
    pynvml.nvmlClocksEventReasonApplicationsClocksSetting: "application clocks",
    pynvml.nvmlClocksEventReasonSwPowerCap: "power cap",
    pynvml.nvmlClocksEventReasonHwSlowdown: "hardware slowdown",
    pynvml.nvmlClocksEventReasonSyncBoost: "sync boost",
    pynvml.nvmlClocksEventReasonSwThermalSlowdown: "thermal slowdown",
    pynvml.nvmlClocksEventReasonHwThermalSlowdown: "hardware thermal slowdown",
    pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown: "power brake",
    pynvml.nvmlClocksEventReasonDisplayClockSetting: "display clocks",
}


class Question(NamedTuple):
    """A call of its own, asked every so many looks; `lacking`: only where no field of that name is answered."""

    names: tuple[str, ...]
    answer: Callable[[Any], tuple[Any, ...]]
    every: int = 1
    lacking: str | None = None


def _utilization(gpu: Any) -> tuple[int, int]:
    rates = pynvml.nvmlDeviceGetUtilizationRates(gpu)
    return rates.gpu, rates.memory


def _memory(gpu: Any) -> tuple[int]:
    # in the second version, `used` is without what the driver keeps for itself
    info = ask(None, pynvml.nvmlDeviceGetMemoryInfo, gpu, pynvml.nvmlMemory_v2)
    return ((info or pynvml.nvmlDeviceGetMemoryInfo(gpu)).used,)


def _power(gpu: Any) -> tuple[float]:
    return (pynvml.nvmlDeviceGetPowerUsage(gpu) / 1e3,)


def _energy(gpu: Any) -> tuple[float]:
    return (pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1e3,)


def _temperature(gpu: Any) -> tuple[int]:
    return (pynvml.nvmlDeviceGetTemperature(gpu, pynvml.NVML_TEMPERATURE_GPU),)


def _throttle(gpu: Any) -> tuple[str]:
    reasons = ask(None, pynvml.nvmlDeviceGetCurrentClocksEventReasons, gpu)
    if reasons is None:  # the older name of the same
        reasons = pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu)
    return ("|".join(name for bit, name in REASONS.items() if reasons & bit),)


def _clock(kind: int) -> Callable[[Any], tuple[int]]:
    return lambda gpu: (pynvml.nvmlDeviceGetClockInfo(gpu, kind),)


def _ecc(kind: int) -> Callable[[Any], tuple[int]]:
    return lambda gpu: (pynvml.nvmlDeviceGetTotalEccErrors(gpu, kind, pynvml.NVML_VOLATILE_ECC),)


def _pcie(kind: int) -> Callable[[Any], tuple[int]]:
    return lambda gpu: (pynvml.nvmlDeviceGetPcieThroughput(gpu, kind) * 1024,)  # it counts for 20 ms


QUESTIONS = (
    Question(("utilization_percent", "memory_utilization_percent"), _utilization),
    Question(("memory_used_bytes",), _memory),
    Question(("power_w",), _power, lacking="power_w"),
    Question(("energy_j",), _energy, lacking="energy_j"),
    Question(("temperature_c",), _temperature),
    Question(("sm_clock_mhz",), _clock(pynvml.NVML_CLOCK_SM)),
    Question(("memory_clock_mhz",), _clock(pynvml.NVML_CLOCK_MEM)),
    Question(("throttle",), _throttle),
    Question(("ecc_corrected",), _ecc(pynvml.NVML_MEMORY_ERROR_TYPE_CORRECTED), SLOW_EVERY),
    Question(("ecc_uncorrected",), _ecc(pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED), SLOW_EVERY),
    Question(("pcie_tx_bytes_per_s",), _pcie(pynvml.NVML_PCIE_UTIL_TX_BYTES), SLOW_EVERY, "pcie_tx_bytes"),
    Question(("pcie_rx_bytes_per_s",), _pcie(pynvml.NVML_PCIE_UTIL_RX_BYTES), SLOW_EVERY, "pcie_rx_bytes"),
)


def ask(default: Any, question: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return question(*arguments)
    except ERRORS:
        return default


class Gpu:
    """A GPU, or the slice of one that MIG gave this process; `device` is its number among those that CUDA shows.
    `index` is NVML's on this node."""

    def __init__(self, device: int, handle: Any):
        self.device = device
        self.uuid = str(ask(f"device {device}", pynvml.nvmlDeviceGetUUID, handle))
        self.name = str(ask("GPU", pynvml.nvmlDeviceGetName, handle))
        card = ask(handle, pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle, handle)
        self.index: int | None = ask(None, pynvml.nvmlDeviceGetIndex, card)
        self._handle = handle
        self._counters: dict[str, Counter] = {}
        self._fields: list[Field] = []
        for field in FIELDS:
            if all(field.name != each.name for each in self._fields) and self._values([field])[0] is not None:
                self._fields.append(field)
        known = {each.name for each in self._fields}
        questions = [each for each in QUESTIONS if each.lacking is None or each.lacking not in known]
        self._questions = [each for each in questions if ask(None, each.answer, handle) is not None]
        self._counters = {}
        self._looks = 0
        self._before: tuple[float, dict[str, Any]] = 0.0, {}  # when, and how far the counters of traffic were

    def look(self, now: float) -> dict[str, Any]:
        """Those fields of a `Sample` that could be told; `now` in seconds of any clock, for what is per second."""
        found: dict[str, Any] = {}
        for question in self._questions:
            if self._looks % question.every == 0:
                answers = ask((None,) * len(question.names), question.answer, self._handle)
                found |= {name: self._counted(name, each) for name, each in zip(question.names, answers)}
        found |= {field.name: value for field, value in zip(self._fields, self._values(self._fields))}
        self._looks += 1
        then, stood = self._before
        self._before = now, {name: found.pop(name, None) for name in TRAFFIC}
        for name, stands in self._before[1].items():
            if stands is not None and stood.get(name) is not None and now > then:
                found[f"{name}_per_s"] = (stands - stood[name]) / (now - then)
        return found

    def _counted(self, name: str, value: Any, top: int | None = None) -> Any:
        """Of a counter, what it counted since the first look."""
        if value is None or name not in COUNTERS:
            return value
        return self._counters.setdefault(name, Counter(top))(value)

    def _values(self, fields: list[Field]) -> list[Any]:
        wanted = [(each.field, each.scope) for each in fields]
        answers = ask(None, pynvml.nvmlDeviceGetFieldValues, self._handle, wanted) if wanted else None
        return [None] * len(fields) if answers is None else list(map(self._value, fields, answers))

    def _value(self, field: Field, answer: Any) -> Any:
        if answer.nvmlReturn != pynvml.NVML_SUCCESS or answer.valueType >= len(MEMBERS):
            return None
        value = getattr(answer.value, MEMBERS[answer.valueType])
        top = 1 << 32 if answer.valueType == UNSIGNED_INT else None
        return self._counted(field.name, value, top) * field.factor
