"""What holds for every test: no torch.compile (it wants a C++ compiler), no colours, no hub."""

import os
import signal

from hypothesis import settings

# whatever runs the tests may have switched Ctrl-C off, for itself and so for all its children
signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ["TORCHDYNAMO_DISABLE"] = "1"
# OpenMP threads spin while they wait: on small matrices and a busy machine that is ten times slower
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["NO_COLOR"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

# the same examples in every run, and no deadline: a busy machine is no defect
settings.register_profile("book", deadline=None, derandomize=True)
settings.load_profile("book")
