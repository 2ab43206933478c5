"""Networks in, bundles out: teachers for devices, students from training."""
