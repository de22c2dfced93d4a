"""Weights in binary-coding quantization: their format, the solvers that find it, the layer that multiplies with it."""
