"""What holds for every test: no torch.compile (it wants a C++ compiler), no colours, no hub."""

import os

os.environ["TORCHDYNAMO_DISABLE"] = "1"
os.environ["NO_COLOR"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
