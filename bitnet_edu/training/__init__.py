"""Quantization-aware training of the embedded model `tiny`: `python -m bitnet_edu.training`."""

import os

# Torch's threads wait for each other by turning in circles, unless told to sleep before it is
# loaded: on a machine with other work to do that makes a training five times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
