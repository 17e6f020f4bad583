"""Lower bounds of the layer error: one tier per file, each a certificate that holds for any input."""

from .corr_eigenvalue import CorrEigenvalue
from .dnn import Dnn
from .naive import Naive
from .qcr import Qcr
from .row_split import RowSplit
from .sdp import Sdp
from .service import TIERS, LayerBound, bound
from .shared_split import SharedSplit

__all__ = [
    "TIERS",
    "CorrEigenvalue",
    "Dnn",
    "LayerBound",
    "Naive",
    "Qcr",
    "RowSplit",
    "Sdp",
    "SharedSplit",
    "bound",
]
