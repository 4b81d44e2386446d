"""What the device of this process is called."""

import os
import pathlib
import platform
import re

import jax


def device_name() -> str:
    """Of the first device of this process; of a CPU, its model and number of cores too."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return str(device.device_kind)
    return f"CPU ({_processor()}, {os.cpu_count()} cores)"


def _processor() -> str:
    cpuinfo = pathlib.Path("/proc/cpuinfo")  # `platform.processor` is empty on many Linuxes
    text = cpuinfo.read_text() if cpuinfo.is_file() else ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, flags=re.MULTILINE)
    return match.group(1) if match else platform.processor() or platform.machine()
