"""Where the library is used. The library never imports from here."""

import logging

# On some CPUs bitsandbytes, which transformers and PEFT import if it is there, warns in every process that it has no
# fast product of 4-bit weights. No recipe uses it: it has no gradient.
logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)
