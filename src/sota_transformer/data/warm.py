"""What the fork server loads before there is any work, so that each worker is born with it.

The one module that does something on import: importing is all that a fork server can be told to do.
Nothing else imports it, and it starts no thread.
"""

import gc

gc.disable()  # all that is made here stays, so looking through it for garbage is in vain

import sota_transformer.data.encode  # noqa: E402, F401
from sota_transformer.data.tokenizer import warm_up  # noqa: E402

warm_up()
gc.freeze()
gc.enable()
