"""Quantization-aware training of the embedded model `tiny`: `python -m bitnet_edu.training`."""
