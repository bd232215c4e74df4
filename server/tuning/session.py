"""One tuning: from a loaded model and photos to judged parameters."""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from server import __version__
from server.calibration.facts import device_name
from server.device import tuned_file
from server.device.models import LoadedModel
from server.errors import SettingsError
from server.model_spec import ModelSpec
from server.tuning import unfinished
from server.tuning.bands import Band
from server.tuning.judging import Gain, Judge
from server.tuning.learning import Learning, Progress
from server.tuning.photos import Photos
from tome_core import tuned
from tome_core.tuning import Recipe, Tuner

logger = logging.getLogger(__name__)

GPU_RECIPE = Recipe()
CPU_RECIPE = Recipe(batch_size=64)
"""Half of the views, so that a CPU takes half an hour. The loss of accuracy against all of them is within noise."""


class Result(NamedTuple):
    """The best parameters, and their gain on the judging photos."""

    tuned: tuned.Tuned
    gain: Gain


class Session:
    """One tuning. It resumes a stopped one of the same model, photos, band and recipe.

    Args:
        loaded: The model, with weights; it is moved to the device.
        spec: Its settings.
        device: The device for learning.
        band: The band of `r`.
        photos: The photos.
        output: File for the parameters; None for the model's own place.
        state_dir: The state folder.

    Attributes:
        progress: Progress so far.

    Raises:
        SettingsError: The model has random weights, or no place for the parameters is writable.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        spec: ModelSpec,
        device: torch.device,
        band: Band,
        photos: Photos,
        output: Path | None,
        state_dir: Path | None,
    ) -> None:
        if loaded.weights is None:
            raise SettingsError(f"{loaded.info.name} has random weights; tuned numbers need fixed weights")
        self._band, self._photos, self._device = band, photos, device
        self._weights = tuned.fingerprints(loaded.merged.model)
        # Checked before the learning, which takes minutes.
        places = [output] if output else tuned_file.places(spec, self._weights["float32"], loaded.weights, state_dir)
        if not places:
            raise SettingsError(f"{spec.name} has no folder of its own, and there is no state folder; use -o FILE")
        writable = [place for place in places if tuned_file.can_be_written(place)]
        if not writable:
            raise SettingsError(f"{' and '.join(map(str, places))} cannot be written; use -o FILE")
        kept = writable[-1]  # the state folder rather than that of the weights
        self._unfinished: Path | None = kept.with_name(kept.name + unfinished.SUFFIX)
        loaded.merged.to(device)
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        recipe = GPU_RECIPE if device.type == "cuda" else CPU_RECIPE
        self._tuner = Tuner(loaded.merged, recipe, torch.bfloat16 if has_bf16 else None)
        self._seen = loaded.info.preprocessing
        self._judge = Judge(self._tuner, photos.judges.to(device), self._seen)
        self._of = self._name()
        self.progress = Progress()
        if found := unfinished.take_up(self._unfinished, self._of):
            state, self.progress = found
            self._tuner.resume(state)

    @property
    def can_go_on(self) -> bool:
        """Whether a later session can resume this one."""
        return self._unfinished is not None

    def learn(self, longest_s: float, told: Callable[[Progress, float], None], stop: Callable[[], bool]) -> None:
        """Learns to the end, for at most `longest_s` in all, or until it is stopped.

        Raises:
            EngineError: The loss is not finite.
        """
        photos = self._photos.learned.to(self._device)
        learning = Learning(self._tuner, self._judge, photos, self._seen, self._band, longest_s, self.progress)
        learning.run(told, self._keep, stop)

    def result(self) -> Result:
        """Judges the best parameters so far, at every `r` of the band."""
        self._tuner.take(self.progress.numbers)
        gain = self._judge.gain(range(self._band[0], self._band[1] + 1))
        band = tuned.Band(*self._band, self.progress.numbers)
        return Result(tuned.Tuned([band], self._weights, self._about(gain)), gain)

    def forget(self) -> None:
        """Removes the file for resuming."""
        if self._unfinished:
            unfinished.remove(self._unfinished)

    def _keep(self, progress: Progress) -> None:
        if self._unfinished is None:
            return
        try:
            unfinished.keep(self._unfinished, self._of, self._tuner.state(), progress)
        except OSError as error:
            logger.warning("a stopped tuning cannot be resumed: %s: %s", self._unfinished, error.strerror)
            self._unfinished = None

    def _name(self) -> str:
        """A hash of everything that a stopped session must share with this one."""
        facts = (self._weights["float32"], self._photos.sha256, self._band, asdict(self._tuner.recipe), __version__)
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def _about(self, gain: Gain) -> dict[str, Any]:
        judges = len(self._photos.judges)
        return {
            "photos": {"learned": len(self._photos.learned), "judges": judges, "sha256": self._photos.sha256},
            "recipe": asdict(self._tuner.recipe),
            "steps": self.progress.step,
            "seconds": round(self.progress.seconds, 1),
            "device": device_name(self._device),
            "versions": {"tome-server": __version__} | {name: version(name) for name in ("torch", "timm")},
            "made": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "agreement": [
                {"r": r, "before": round(before, 4), "after": round(after, 4)}
                for r, before, after in zip(gain.r, gain.before, gain.after, strict=True)
            ],
            "gain": [round(each, 4) for each in (gain.mean, *gain.interval)],
        }
