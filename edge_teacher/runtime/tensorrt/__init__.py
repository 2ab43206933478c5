"""NVIDIA's own runtime: engines built on the device they run on, remembered, and executed.

The module (`tensorrt` of JetPack, 10.x or 11.x) is a parameter everywhere, so the same code builds with
`tensorrt_rtx` where there is no GPU.
"""
