"""A card below pynvml, where there is no NVML: it answers in the C structures that the real library fills."""

import ctypes
import time

import pynvml

ALL_LINKS = 0xFFFFFFFF
UNSIGNED_INT, UNSIGNED_LONG_LONG = 1, 3


class Card:
    """Draws `watts` since it was made; attributes may be changed while somebody looks. `lacks` are functions that the
    driver does not have, `fields` those of nvmlDeviceGetFieldValues with their types: numbers, or what makes one."""

    def __init__(self, watts: float = 200.0, lacks=()):
        self.watts, self.lacks, self.began = watts, set(lacks), time.perf_counter()
        self.used, self.reasons, self.busy = 5 << 30, 0, 90
        self.fields = {
            (186, 0): (UNSIGNED_INT, lambda: int(self.watts * 1e3)),
            (83, 0): (UNSIGNED_LONG_LONG, self.millijoules),
            (138, ALL_LINKS): (UNSIGNED_LONG_LONG, 1000),
            (139, ALL_LINKS): (UNSIGNED_LONG_LONG, 2000),
            (197, 0): (UNSIGNED_INT, 1 << 20),
            (198, 0): (UNSIGNED_INT, 1 << 21),
        }

    def millijoules(self) -> int:
        return 10**9 + int((time.perf_counter() - self.began) * self.watts * 1e3)

    def install(self, monkeypatch) -> "Card":
        monkeypatch.setattr(pynvml, "_LoadNvmlLibrary", lambda: None)
        monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer", self.function)
        return self

    def function(self, name: str):
        if name in self.lacks or not hasattr(self, name):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
        return getattr(self, name)

    def nvmlInitWithFlags(self, flags):
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index, handle):
        return 0 if index.value == 0 else pynvml.NVML_ERROR_INVALID_ARGUMENT

    def nvmlDeviceGetIndex(self, handle, index):
        index._obj.value = 3
        return 0

    def nvmlDeviceGetUUID(self, handle, text, size):
        text.value = b"GPU-aa"
        return 0

    def nvmlDeviceGetName(self, handle, text, size):
        text.value = b"Card"
        return 0

    def nvmlDeviceGetUtilizationRates(self, handle, rates):
        rates._obj.gpu, rates._obj.memory = self.busy, 40
        return 0

    def nvmlDeviceGetMemoryInfo_v2(self, handle, info):
        info._obj.used = self.used
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle, info):
        info._obj.used = self.used + (1 << 29)
        return 0

    def nvmlDeviceGetTemperature(self, handle, sensor, found):
        found._obj.value = 55
        return 0

    def nvmlDeviceGetClockInfo(self, handle, kind, found):
        found._obj.value = 1980 if kind.value == pynvml.NVML_CLOCK_SM else 2619
        return 0

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle, found):
        found._obj.value = self.reasons
        return 0

    def nvmlDeviceGetTotalEccErrors(self, handle, kind, which, found):
        found._obj.value = 2 if kind.value == pynvml.NVML_MEMORY_ERROR_TYPE_CORRECTED else 0
        return 0

    def nvmlDeviceGetPowerUsage(self, handle, found):
        found._obj.value = int(self.watts * 1e3)
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle, found):
        found._obj.value = self.millijoules()
        return 0

    def nvmlDeviceGetPcieThroughput(self, handle, kind, found):
        found._obj.value = 7
        return 0

    def nvmlDeviceGetFieldValues(self, handle, count, values):
        for each in values._obj:
            kind, value = self.fields.get((each.fieldId, each.scopeId), (0, None))
            each.nvmlReturn = pynvml.NVML_ERROR_NOT_SUPPORTED if value is None else pynvml.NVML_SUCCESS
            each.valueType = kind
            if value is not None:
                ctypes.memset(ctypes.byref(each.value), 0, ctypes.sizeof(each.value))
                setattr(each.value, {1: "uiVal", 3: "ullVal"}[kind], value() if callable(value) else value)
        return 0
