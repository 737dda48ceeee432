"""Where does the model recall a fact? Causal tracing (Meng et al. 2022, section 2).

Three kinds of run give an answer's probability: clean; corrupted, with noise on the subject's embeddings; and corrupted
with some clean activations put back. What raises the probability there carries the fact. The files, in the order of the method:

| file        | what it does                                                                         |
|-------------|--------------------------------------------------------------------------------------|
| roles       | what a position is to the fact, so that prompts of different lengths can be averaged |
| cells       | what a run restores or holds: components, patches, cells, windows                    |
| baseline    | the clean and the corrupted runs that every cell starts from                         |
| engine      | the sweep: every cell, computed only where it differs from the corrupted run         |
| measures    | what of the answer is read in a run, and the number made of it                       |
| preparation | `prepare`: a fact as tokens, corrupted embeddings and reads                          |
| result      | `Trace` and its file                                                                 |
| tracer      | `trace` and `trace_all` run the grid of all layers and tokens, `restore` any cells   |
| severing    | `severed`: a restored state while MLPs or attention are held at corrupted values     |
| attribution | gradients instead of runs: attribution patching and integrated gradients             |
| accuracy    | what fewer draws, bfloat16 or gradients cost, on a sample of cells                   |
| averages    | effects over many facts, by layer and token role, with intervals                     |
"""

from mechedit.settings import TraceSettings
from mechedit.tracing.cells import STATES, WINDOWED, Cell, Component, Patch, single, window
from mechedit.tracing.measures import measured
from mechedit.tracing.preparation import Prepared, prepare
from mechedit.tracing.result import Trace
from mechedit.tracing.tracer import grid, in_precision, restore, trace, trace_all

__all__ = ["STATES", "WINDOWED", "Cell", "Component", "Patch", "Prepared", "Trace", "TraceSettings", "grid", "in_precision", "measured", "prepare", "restore", "single", "trace", "trace_all", "window"]  # fmt: skip
