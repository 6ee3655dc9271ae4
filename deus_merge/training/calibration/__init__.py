"""Outputs of new layers in closed form: from what their writers read, and the gradient behind them."""

from .calibrate import Calibrated, calibrate
from .options import CalibrationOptions

__all__ = ["Calibrated", "CalibrationOptions", "calibrate"]
