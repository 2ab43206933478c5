"""Two installations of one project, and the device's never brings torch or onnx.

pip install .[edge]           on a device
pip install .[coordinator]    on a workstation
"""

from setuptools import find_packages, setup

EDGE = [
    "cryptography>=42",
    "msgspec>=0.19",
    "numpy>=1.26",
    "paho-mqtt>=2.1,<2.3",
    "tomli>=2; python_version < '3.11'",
]
# On a Jetson the runtime may come from JetPack instead, so it is not part of the base requirements.
RUNTIME = ["onnxruntime>=1.18"]
COORDINATOR = [
    *RUNTIME,
    "zstandard>=0.22",
    "iotcore>=0.4,<0.5",
    "jinja2>=3.1",
    "onnx>=1.18",
    "onnxscript>=0.5",
    "pillow>=10",
    "rich>=13",
    "sympy>=1.13",
    "tensorboard>=2.18",
    "torch>=2.9",
]
# Packed answers: worth having on a slow link, and offered only where it is installed.
ZSTD = ["zstandard>=0.22"]
# Numbers of runs on a server of one's own, where MLFLOW_TRACKING_URI is set.
MLFLOW = ["mlflow-skinny>=3.1"]
# Peers that the transport is measured against.
BENCHMARKS = ["grpcio>=1.60", "matplotlib>=3.8"]
TEST = [
    "hypothesis>=6.100",
    "import-linter>=2.1",
    "prometheus-client>=0.21",
    "mypy>=1.14",
    "pytest>=8.2",
    "pytest-timeout>=2.3",
    "pyyaml>=6",
    "ruff>=0.9",
    "tomli>=2",
    "types-pyyaml>=6",
]

setup(
    name="fedsa-edge",
    version="0.1.0",
    description="Federated selective aggregation: private teachers on edge devices teach one student",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(
        include=["edge_teacher*", "coordinator*", "export*", "firmware_configs*"]
    ),
    package_data={"coordinator": ["*.html.j2"]},
    install_requires=EDGE,
    extras_require={
        "edge": RUNTIME,
        "zstd": ZSTD,
        "mlflow": MLFLOW,
        "benchmarks": BENCHMARKS,
        "coordinator": COORDINATOR,
        "test": [*COORDINATOR, *MLFLOW, *TEST],
    },
    entry_points={
        "console_scripts": [
            "edge-teacher = edge_teacher.cli:main",
            "fedsa = coordinator.entry:main",
        ]
    },
)
