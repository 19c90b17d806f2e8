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

from pipeline.losses import (
    difficulty_flatten_loss,
    disagreement,
    patch_error,
    self_consistency_loss,
)
from pipeline.masking import gather_tokens, parallel_parts
from pipeline.methods.efficient_mae import DifficultyFlatten, easiest
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

    `flattening`: Efficient MAE's loss and decoder masking on every part; None, as in the paper: neither. Of
    what a part is asked for the easiest `num_slots` patches are decoded; what is beyond them or beyond the
    threshold counts for nothing, the consistency included.
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
        flattening: DifficultyFlatten | None,
        num_slots: int,
        normalize_targets: bool,
    ) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.num_parts, self.normalize_targets = num_parts, normalize_targets
        self.consistency_weight, self.consistency_kind = consistency_weight, consistency_kind
        self.flattening = flattening
        self.grid, self.patch_size = encoder.grid, encoder.patch_size
        self.noise_size = self.grid**2
        self.part_size = self.noise_size // num_parts
        self.num_decoded = max(1, round(decode_share * self.part_size))  # of each part, by each other part
        self.num_slots = min(num_slots, (num_parts - 1) * self.num_decoded)
        self.some_have_no_slot = (
            flattening is not None and self.num_slots < (num_parts - 1) * self.num_decoded
        )

    def forward(self, images: torch.Tensor, noise: torch.Tensor) -> MethodOutput:
        """MethodOutput with K parts, V = L/K, M = (K-1) x the decoded patches of a part."""
        patches = self.patches(images)
        parts = parallel_parts(noise, self.num_parts)  # (B, K, V)
        predicted_ids = parts[:, :, : self.num_decoded]
        mask_ids = self._for_each_slot(predicted_ids).flatten(2, 3)  # (B, K, M)
        distance, keep = None, None
        if self.flattening:
            mask_ids, distance, keep = self._flattened(parts, mask_ids)

        prediction = self._predict(patches, parts, mask_ids, keep)  # (B, K, M, D)
        if self.some_have_no_slot:
            target = self.targets(gather_tokens(patches, mask_ids.flatten(1))).view(*mask_ids.shape, -1)
        else:  # normalised once for all the parts that predict it
            target = self.targets(gather_tokens(patches, predicted_ids.flatten(1))).view(
                *predicted_ids.shape, -1
            )
            target = self._for_each_slot(target).flatten(2, 3)
        error = patch_error(prediction, target)
        if self.flattening:
            gamma = self.flattening.gamma
            parts_keep = None if keep is None else keep.flatten(0, 1)
            reconstruction = difficulty_flatten_loss(
                error.flatten(0, 1), distance.flatten(0, 1), gamma, parts_keep
            )
        else:
            reconstruction = error.flatten(1).mean(dim=1).mean()
        consistency = self._consistency(prediction, mask_ids, keep)
        loss = reconstruction + self.consistency_weight * consistency
        metrics = {"reconstruction": reconstruction.detach(), "consistency": consistency.detach()}
        return MethodOutput(loss, prediction.detach(), target, parts, mask_ids, metrics)

    @torch.no_grad()
    def reconstruct(self, images: torch.Tensor, noise: torch.Tensor) -> Reconstruction:
        patches = self.patches(images)
        parts = parallel_parts(noise, self.num_parts)
        mask_ids = self._for_each_slot(parts).flatten(2, 3)
        prediction = self._predict(patches, parts, mask_ids, keep=None)
        return self.picture(patches, prediction, parts, mask_ids)

    def _for_each_slot(self, of_part: torch.Tensor) -> torch.Tensor:
        """of_part (B, K, ...) -> (B, K, K-1, ...): for part k and slot s what belongs to the part predicted
        there."""
        return torch.stack([of_part.roll(-1 - s, dims=1) for s in range(self.num_parts - 1)], dim=2)

    def _flattened(
        self, parts: torch.Tensor, mask_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """-> what each part has a slot for, (B, K, M); its difficulty; which of it the threshold keeps."""
        distance = self.flattening.difficulty(parts.flatten(0, 1), self.grid)
        distance = distance.view(*parts.shape[:2], -1).gather(2, mask_ids)
        if self.some_have_no_slot:
            slots = easiest(distance, self.num_slots)
            mask_ids, distance = mask_ids.gather(2, slots), distance.gather(2, slots)
        return mask_ids, distance, self.flattening.keep(distance, self.flattening.beta)

    def _predict(
        self, patches: torch.Tensor, parts: torch.Tensor, mask_ids: torch.Tensor, keep: torch.Tensor | None
    ) -> torch.Tensor:
        batch, num_parts, visible = parts.shape
        views = batch * num_parts
        visible_ids = parts.reshape(views, visible)
        encoded = self.encoder(gather_tokens(patches, parts.flatten(1)).view(views, visible, -1), visible_ids)
        keep = None if keep is None else keep.reshape(views, -1)
        prediction = self.decoder(encoded, visible_ids, mask_ids.reshape(views, -1), keep)
        return prediction.float().view(*mask_ids.shape, -1)

    def _consistency(
        self, prediction: torch.Tensor, mask_ids: torch.Tensor, keep: torch.Tensor | None
    ) -> torch.Tensor:
        """`losses.self_consistency_loss`: in value always, and by its own code where predictions are dropped.

        Without one, every pair of parts shares equally many patches, so the mean over pairs of means is one
        mean over the packed layout. K = 2 has no pair that predicts the same patch: 0.
        """
        if keep is not None or self.some_have_no_slot:
            keep = torch.ones_like(mask_ids, dtype=torch.bool) if keep is None else keep
            whole = prediction.new_zeros(*prediction.shape[:2], self.noise_size, prediction.shape[3])
            whole = whole.scatter(2, mask_ids[..., None].expand_as(prediction), prediction)
            predicted = keep.new_zeros(*keep.shape[:2], self.noise_size).scatter(2, mask_ids, keep)
            return self_consistency_loss(whole, predicted, self.consistency_kind)
        # Part m's predictions by its K-1 others, one a slot: rolled back, slot s of part m - 1 - s.
        slots = prediction.unflatten(2, (self.num_parts - 1, self.num_decoded))
        by_target = [slots[:, :, s].roll(1 + s, dims=1) for s in range(self.num_parts - 1)]
        pairs = list(combinations(by_target, 2))
        total = prediction.new_zeros(())
        for first, second in pairs:
            total = total + disagreement(first, second, self.consistency_kind).mean()
        return total / max(len(pairs), 1)
