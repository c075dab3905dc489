"""What the packages of OpenMMLab say that is no news of a run, and why it is left out: people read logs."""

from __future__ import annotations

import logging
import warnings

from hvt_backbones.images import silence_false_alarms

# beginning of a Python warning -> why it is none of the user's business
WARNINGS = {
    "faster_coco_eval is not installed": "another metric than COCO's own, asked for by nobody",
    "Default ``avg_non_ignore`` is False": "the published settings, which the configurations keep",
    "`reduce_zero_label` will be deprecated": "the way in which ADE20K's configurations say it",
    "The draw is False": "of a hook that draws only when it is asked to",
    r"Detected call of `scheduler\.step": "accumulated gradients, bad steps and fp16 leave the optimiser out at times",
    "Setting (OMP|MKL)_NUM_THREADS": "MMEngine's own doing, in each process",
    "To copy construct from a tensor": "mmdetection's mask head, of masks that a cascade has averaged",
    r"`torch\.jit\.(script|interface|script_method)` is deprecated": "calls of the packages themselves",
}
# beginning of a record of MMEngine's logger -> the same
RECORDS = {
    '"FileClient" will be deprecated': "a call of MMEngine's own hooks",
    '"HardDiskBackend" is the alias': "the same",
    "paramwise_options -- ": "two lines for each parameter, hundreds in all",
    "The prefix is not set in metric class": "the names of mmsegmentation's own metric",
    "`save_param_scheduler` is True but": "a run without a schedule",
    "Since `metrics` is an empty dict": "an evaluation that finds nothing yet, as its own line says",
}


def _is_news(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(tuple(RECORDS))


def quiet_imports() -> None:
    """Before anything of OpenMMLab is imported."""
    silence_false_alarms()
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    # MMEngine imports it where it is installed; it says that it lacks a kernel which nothing here calls
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def quiet_logger(logger: logging.Logger) -> None:
    logger.addFilter(_is_news)
