"""The pretrained model of `make real-model`, where it is there: tests never fetch it."""

from __future__ import annotations

from scripts import real_model

FOLDER = real_model.FOLDER / real_model.NAME
MISSING = None if real_model.is_whole(FOLDER) else f"{FOLDER} is not there; `make real-model` makes it"
