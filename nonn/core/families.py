"""Constants of the families of networks, beyond the sizes that an architecture states.

Apart from the schema, for stages depend on these numbers: `nonn.training.networks` builds layers of them, and what is
counted without PyTorch has to agree.
"""

from __future__ import annotations

#: Side of the patches that the first layer of family airbench whitens, in pixels.
WHITENED = 2
#: Channels inside an inverted residual of family mobilenet, in units of those that enter it.
EXPANSION = 6
#: Channels of its last convolution in units of those before it: 1280 to 320 in the paper of MobileNetV2.
LAST_EXPANSION = 4
