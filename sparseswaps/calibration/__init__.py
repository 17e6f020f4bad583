"""From texts to what layers are fitted to: windows, activations, Gram matrices, gradients."""

from .windows import Windows, calibration_windows, evaluation_windows, window_length

__all__ = ["Windows", "calibration_windows", "evaluation_windows", "window_length"]
