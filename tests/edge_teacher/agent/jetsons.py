"""Folders made to look like /sys and /proc of Jetsons, with the names and units their kernels use."""

from __future__ import annotations

from pathlib import Path


def write(root: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


def _zones(**milli: int) -> dict[str, object]:
    files: dict[str, object] = {}
    for number, (name, value) in enumerate(milli.items()):
        files[f"class/thermal/thermal_zone{number}/type"] = f"{name}-thermal"
        files[f"class/thermal/thermal_zone{number}/temp"] = value
    return files


def _cooling(**states: int) -> dict[str, object]:
    files: dict[str, object] = {}
    for number, (name, state) in enumerate(states.items()):
        folder = f"class/thermal/cooling_device{number}"
        files[f"{folder}/type"] = name.replace("_", "-")
        files[f"{folder}/cur_state"] = state
        files[f"{folder}/max_state"] = 10
    return files


def orin(root: Path) -> Path:
    """An AGX Orin as L4T 36 shows it: INA3221 with three rails and a sum, GPU load beside its devfreq."""
    monitor = "class/hwmon/hwmon4"
    return write(
        root,
        {
            **_zones(cpu=48562, gpu=45250, cv0=-256000, tj=49100),
            **_cooling(
                pwm_fan=3, cpu_throttle_alert=0, devfreq_17000000_gpu=0, hot_surface_alert=1
            ),
            f"{monitor}/name": "ina3221",
            f"{monitor}/in1_label": "VDD_GPU_SOC",
            f"{monitor}/in1_input": 19880,
            f"{monitor}/curr1_input": 120,
            f"{monitor}/in2_label": "VDD_CPU_CV",
            f"{monitor}/in2_input": 19864,
            f"{monitor}/curr2_input": 40,
            f"{monitor}/in3_label": "NC",
            f"{monitor}/in3_input": 0,
            f"{monitor}/curr3_input": 0,
            f"{monitor}/in7_label": "sum of shunt voltages",
            f"{monitor}/in7_input": 1,
            "class/hwmon/hwmon3/name": "soctherm_oc",
            "class/hwmon/hwmon3/oc1_event_cnt": 0,
            "class/hwmon/hwmon3/oc2_event_cnt": 4,
            "class/hwmon/hwmon3/oc3_event_cnt": 0,
            "class/devfreq/15340000.vic/device/of_node/name": "vic",
            "class/devfreq/17000000.gpu/device/of_node/name": "gpu\0",
            "class/devfreq/17000000.gpu/device/load": 453,
        },
    )


def thor(root: Path) -> Path:
    """An AGX Thor as L4T 38 shows it: a second monitor of one rail, and no GPU load."""
    return write(
        root,
        {
            **_zones(cpu=53700, soc012=55100, tj=55100),
            **_cooling(gpu_throttle_alert=0, cpu_throttle_alert=0, devfreq_gpu_gpc_0=0),
            "class/thermal/thermal_zone3/type": "gpu-thermal",  # without power it cannot be read
            "class/hwmon/hwmon2/name": "ina3221",
            "class/hwmon/hwmon2/in1_label": "VDD_GPU",
            "class/hwmon/hwmon2/in1_input": 12000,
            "class/hwmon/hwmon2/curr1_input": 500,
            "class/hwmon/hwmon5/name": "ina238",
            "class/hwmon/hwmon5/label": "VIN",
            "class/hwmon/hwmon5/power1_input": 16_802_000,
        },
    )


def processes(root: Path, cgroup: str = "0::/system.slice/edge-teacher.service") -> Path:
    return write(
        root,
        {
            "meminfo": "MemTotal: 8000000 kB\nMemFree: 1 kB\nMemAvailable:    5242880 kB",
            "self/statm": "100000 25600 1 1 0 1 0",
            "self/cgroup": cgroup,
        },
    )
