"""Getting a model ready for the weight formats that a cluster's workers are to hold it in."""

from __future__ import annotations

from collections.abc import Callable

from segue.config import EngineSettings
from segue.models.model_dir import calibration_file
from segue.models.store import ModelHandle


def ensure_ready(model: ModelHandle, settings: EngineSettings, progress: Callable[[str, float], None]) -> None:
    """Calibrates the model if `settings` ask for quantized weights and nobody has done it. Raises ModelFileError.

    Models that segue models pull or import has fetched are ready. A kept calibration is not looked into: workers do that.
    """
    formats = {settings.quantization, settings.decode_quantization or settings.quantization}
    if formats != {"none"} and not calibration_file(model.path, model.revision).exists():
        # Loads torch, which whoever starts a cluster otherwise never does.
        from engine.calibration import ensure_calibrated

        ensure_calibrated(model.path, progress)
