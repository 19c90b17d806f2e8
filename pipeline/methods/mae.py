"""MAE: "Masked Autoencoders Are Scalable Vision Learners", He et al., CVPR 2022,
https://arxiv.org/abs/2111.06377.

Equal in value to the official code, github.com/facebookresearch/mae: the same weights, images and noise give
the same loss.
"""

import torch

from pipeline.losses import patch_error
from pipeline.masking import gather_tokens, random_split
from pipeline.methods.method import Method, MethodOutput, Reconstruction
from pipeline.models.decoder import Decoder
from pipeline.models.encoder import Encoder


class MAE(Method):
    """`num_visible` of an image's L patches are encoded; the decoder predicts the others."""

    def __init__(
        self, encoder: Encoder, decoder: Decoder, *, num_visible: int, normalize_targets: bool
    ) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.num_visible, self.normalize_targets = num_visible, normalize_targets
        self.grid, self.patch_size = encoder.grid, encoder.patch_size
        self.noise_size = self.grid**2

    def forward(self, images: torch.Tensor, noise: torch.Tensor) -> MethodOutput:
        patches = self.patches(images)
        visible_ids, masked_ids = random_split(noise, self.num_visible)
        encoded = self.encoder(gather_tokens(patches, visible_ids), visible_ids)
        prediction = self.decoder(encoded, visible_ids, masked_ids).float()
        target = self.targets(gather_tokens(patches, masked_ids))
        loss = patch_error(prediction, target).mean(dim=1).mean()
        metrics = {"reconstruction": loss.detach()}
        return MethodOutput(loss, prediction.detach(), target, visible_ids, masked_ids, metrics)

    @torch.no_grad()
    def reconstruct(self, images: torch.Tensor, noise: torch.Tensor) -> Reconstruction:
        out = self(images, noise)
        views = (out.prediction[:, None], out.visible_ids[:, None], out.predicted_ids[:, None])
        return self.picture(self.patches(images), *views)
