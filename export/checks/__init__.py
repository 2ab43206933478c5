"""Checks made at export: derivatives against float64 autograd, TensorRT's own parser, FP16."""
