"""Preloaded by the fork server, so that every worker is forked with the encoder ready.

The only module with side effects on import: importing is all that a fork server can be asked to
do. Nothing else imports it, and it starts no thread.
"""

import ctypes
import gc
import sys

gc.disable()  # everything created here is permanent, so collecting is a waste of time

import sota_transformer.data.encode  # noqa: E402, F401
from sota_transformer.data.tokenizer import warm_up  # noqa: E402

warm_up()
if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
    # A worker reuses the same few MB for every unit, so glibc should not unmap them in between.
    # Larger blocks, such as parquet pages, are returned at once and leave no holes.
    mallopt(-3, 8 << 20)  # M_MMAP_THRESHOLD
    mallopt(-1, 16 << 20)  # M_TRIM_THRESHOLD
gc.freeze()
gc.enable()
