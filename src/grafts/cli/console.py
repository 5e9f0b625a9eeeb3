"""Where the command line speaks: answers to standard output, everything else to standard error."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings

from rich.console import Console

out = Console(width=None if sys.stdout.isatty() else 160)
err = Console(stderr=True)


def quiet() -> None:
    """Let the libraries below say nothing that the user of a command cannot act on."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    datasets, transformers = (importlib.import_module(name) for name in ("datasets", "transformers"))
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.logging.set_verbosity(logging.CRITICAL)  # its errors come back as exceptions
    datasets.disable_progress_bars()
    for name in ("accelerate", "torch.distributed", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
