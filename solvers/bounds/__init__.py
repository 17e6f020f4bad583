"""Lower bounds of the layer error: one tier per file, each a certificate that holds for any input."""

from .corr_eigenvalue import CorrEigenvalue
from .dnn import Dnn
from .frank_wolfe import FrankWolfe
from .naive import Naive
from .qcr import Qcr
from .row_split import RowSplit
from .sdp import Sdp
from .shared_split import SharedSplit

__all__ = [
    "CorrEigenvalue",
    "Dnn",
    "FrankWolfe",
    "Naive",
    "Qcr",
    "RowSplit",
    "Sdp",
    "SharedSplit",
]
