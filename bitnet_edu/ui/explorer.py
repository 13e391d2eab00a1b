"""All panels of the explorer in tabs; each is usable alone with one line."""

import ipywidgets

import bitnet_edu
from bitnet_edu.ui.architecture import architecture_panel
from bitnet_edu.ui.benchmark import BenchmarkPanel
from bitnet_edu.ui.chat import ChatPanel
from bitnet_edu.ui.paper import paper_panel
from bitnet_edu.ui.system import SystemPanel


def explorer(source: str = "tiny") -> ipywidgets.Tab:
    """Chat, benchmark, published results, architecture and system, for the model `source`."""
    panels = {
        "Chat": ChatPanel(source),
        "Benchmark": BenchmarkPanel(source),
        "Paper": paper_panel(),
        "Architecture": architecture_panel(bitnet_edu.load(source)),
        "System": SystemPanel(),
    }
    return ipywidgets.Tab(children=list(panels.values()), titles=list(panels))
