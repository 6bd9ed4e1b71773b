"""What an encoder learns from: images of one class should look more alike to it than those of two."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

SHARPNESS = 48.0  # of the softmax over cosines


def pair_loss(features: Tensor, classes: Tensor) -> Tensor:
    """How badly images find the others of their class, in nats: the mean over all pairs of one class of -log of the share that
    the second has in a softmax over the cosines of the first with it and with all images of other classes. 0 where no class has
    two images, or all are of one.

    features: float [M, E]; classes: int64 [M]. This is the multi-class N-pair loss (Sohn 2016, "Improved deep metric learning
    with multi-class N-pair loss objective", eq. 7) of cosines, with every image of another class as a negative.
    """
    unit = F.normalize(features.float())
    similarity = SHARPNESS * unit @ unit.T
    same = classes.unsqueeze(1) == classes
    others = similarity.masked_fill(same, -torch.inf).logsumexp(1, keepdim=True)
    pairs = same ^ torch.eye(len(same), dtype=torch.bool, device=same.device)
    if same.all() or not pairs.any():
        return similarity.sum() * 0
    return F.softplus(others - similarity)[pairs].mean()
