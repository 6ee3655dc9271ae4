"""Outputs of new layers in closed form: from what their writers read, and the gradient behind them."""

from .options import CalibrationOptions
from .run import Calibrated, calibrate

__all__ = ["Calibrated", "CalibrationOptions", "calibrate"]
