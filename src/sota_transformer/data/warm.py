"""What the fork server loads before there is any work, so that each worker is born with it.

The one module that does something on import: importing is all that a fork server can be told to do.
Nothing else imports it, and it starts no thread.
"""

import ctypes
import gc
import sys

gc.disable()  # all that is made here stays, so looking through it for garbage is in vain

import sota_transformer.data.encode  # noqa: E402, F401
from sota_transformer.data.tokenizer import warm_up  # noqa: E402

warm_up()
if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
    # A worker needs the same few MB again for every unit: glibc need not unmap them in between.
    # What is larger, a page of a parquet file, goes back at once and leaves no holes.
    mallopt(-3, 8 << 20)  # M_MMAP_THRESHOLD
    mallopt(-1, 16 << 20)  # M_TRIM_THRESHOLD
gc.freeze()
gc.enable()
