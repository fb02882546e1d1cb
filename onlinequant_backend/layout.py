"""Memory layouts of images and videos."""

from __future__ import annotations

import torch

# Channels last, by a tensor's dimensions; others have no such layout.
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
