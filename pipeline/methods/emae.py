"""EMAE: "Efficient Masked Autoencoders with Self-Consistency", Li et al.
https://arxiv.org/abs/2302.14431.

Parallel mask: one noise vector deals the L patches into K parts without overlap. Every part is encoded alone
and predicts all the others, so an image is used whole in each step, at the mask ratio 1 - 1/K.
Self-consistency: where two parts predict the same patch, their predictions are pulled together.

Written from the paper's abstract and figure captions; its equations and hyperparameters were not at hand. Our
reading: MAE's reconstruction loss on each part's own masked patches, averaged over parts, plus
`consistency_weight` (1) times the mean absolute difference of the predictions of parts i < j over the patches
masked in both, averaged over pairs. No stop-gradient is needed: the two-sided form with stop-gradients has
the gradient of |p_i - p_j| too.
"""

from itertools import combinations

import torch

from pipeline.losses import disagreement, patch_error, patchify
from pipeline.masking import parallel_parts, take
from pipeline.methods.method import Method, MethodOutput, Reconstruction
from pipeline.models.decoder import Decoder
from pipeline.models.encoder import Encoder


class EMAE(Method):
    """`num_parts`: K. `consistency_kind`: l1, l2 or smooth_l1. `decode_share`: of each part's masked
    positions, (0, 1].

    Every patch is visible in exactly one part, so the K parts of an image cost one patch embedding of the
    whole image; to the encoder and the decoder the parts are more images.

    Layout: part k predicts the parts k+1, k+2, ..., k+K-1 (mod K), one slot s = 0 ... K-2 each. With a decode
    share below 1, only the first patches of every part, in noise order and so at random, are ever predicted:
    by all K-1 others, so that every pair of predictions stays a pair.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoder: Decoder,
        *,
        num_parts: int,
        consistency_weight: float,
        consistency_kind: str,
        decode_share: float,
        normalize_targets: bool,
    ) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.num_parts, self.normalize_targets = num_parts, normalize_targets
        self.consistency_weight, self.consistency_kind = consistency_weight, consistency_kind
        self.patch_size, self.noise_size = encoder.patch_size, encoder.grid**2
        self.part_size = self.noise_size // num_parts
        self.num_decoded = max(1, round(decode_share * self.part_size))  # of each part, by each other part

    def forward(self, images: torch.Tensor, noise: torch.Tensor) -> MethodOutput:
        """MethodOutput with K parts, V = L/K, M = (K-1) x the decoded patches of a part."""
        patches = patchify(images, self.patch_size)
        parts = parallel_parts(noise, self.num_parts)  # (B, K, V)
        prediction = self._predict(patches, parts, self.num_decoded)  # (B, K, K-1, n, D)
        asked = parts[:, :, : self.num_decoded]
        target = self.targets(take(patches, asked.flatten(1))).view(*asked.shape, -1)
        target = self._for_each_slot(target)
        reconstruction = patch_error(prediction, target).flatten(1).mean(dim=1).mean()
        consistency = self._consistency(prediction)
        loss = reconstruction + self.consistency_weight * consistency
        return MethodOutput(
            loss,
            prediction.detach().flatten(2, 3),
            target.flatten(2, 3),
            parts,
            self._for_each_slot(asked).flatten(2, 3),
            {"reconstruction": reconstruction.detach(), "consistency": consistency.detach()},
        )

    @torch.no_grad()
    def reconstruct(self, images: torch.Tensor, noise: torch.Tensor) -> Reconstruction:
        patches = patchify(images, self.patch_size)
        parts = parallel_parts(noise, self.num_parts)
        prediction = self._predict(patches, parts, self.part_size)
        return self.picture(
            patches, prediction.flatten(2, 3), parts, self._for_each_slot(parts).flatten(2, 3)
        )

    def _for_each_slot(self, of_part: torch.Tensor) -> torch.Tensor:
        """of_part (B, K, ...) -> (B, K, K-1, ...): for part k and slot s what belongs to the part predicted
        there."""
        return torch.stack([of_part.roll(-1 - s, dims=1) for s in range(self.num_parts - 1)], dim=2)

    def _predict(self, patches: torch.Tensor, parts: torch.Tensor, num_decoded: int) -> torch.Tensor:
        batch, num_parts, visible = parts.shape
        views = batch * num_parts
        visible_ids = parts.reshape(views, visible)
        encoded = self.encoder(take(patches, parts.flatten(1)).view(views, visible, -1), visible_ids)
        asked_ids = self._for_each_slot(parts[:, :, :num_decoded])
        prediction = self.decoder(encoded, visible_ids, asked_ids.reshape(views, -1))
        return prediction.float().view(*asked_ids.shape, -1)

    def _consistency(self, prediction: torch.Tensor) -> torch.Tensor:
        """`losses.self_consistency_loss` on the packed layout (B, K, K-1, n, D), without the positions that
        no pair has.

        All pairs of parts share equally many patches, so the mean over pairs of means is one mean over
        everything. K = 2 has no pair that predicts the same patch: 0.
        """
        # Part m's predictions by its K-1 others, one a slot: rolled back, slot s of part m - 1 - s.
        by_target = [prediction[:, :, s].roll(1 + s, dims=1) for s in range(self.num_parts - 1)]
        pairs = list(combinations(by_target, 2))
        total = prediction.new_zeros(())
        for first, second in pairs:
            total = total + disagreement(first, second, self.consistency_kind).mean()
        return total / max(len(pairs), 1)
