"""EMAE: "Efficient Masked Autoencoders with Self-Consistency", Li et al., https://arxiv.org/abs/2302.14431.

Parallel mask: the L patches of an image are divided into K disjoint parts. Each part is encoded alone and
predicts all the others, so every step uses the whole image, at mask ratio 1 - 1/K. Self-consistency: the
predictions of the same patch by different parts are pulled together.

The loss is our reading of the abstract's description and the figure captions; the paper's equations and
hyperparameters were not available. It is MAE's loss on each part's masked patches, averaged over parts, plus
`consistency_weight` (1) times the mean absolute difference of the predictions of parts i < j over the patches
masked in both, averaged over pairs. Stop-gradients are not needed: the two-sided form with them has the same
gradient. `consistency_mean: all` is a second reading, that of a third-party implementation: its mean is over
all patches, with 0 for those that are not masked in both.
"""

from itertools import combinations

import torch

from pipeline.losses import difficulty_flatten_loss, disagreement, patch_error, self_consistency_loss
from pipeline.masking import gather_tokens, parallel_parts
from pipeline.methods.backbone import build_decoder, build_encoder
from pipeline.methods.efficient_mae import DifficultyFlatten, select_easiest
from pipeline.methods.method import Method, MethodOutput, Reconstruction
from pipeline.methods.registry import register_method
from pipeline.methods.targets import build_target
from pipeline.recipe import Recipe


@register_method("emae")
class EMAE(Method):
    """Encode K disjoint parts of an image and let each predict the others.

    Part k predicts the parts k+1, ..., k+K-1 (mod K), in this order. Encoder and decoder process the parts as
    separate images. If `decode_share` is below 1, the others predict only the first patches of a part in
    noise order, a random subset that is the same for all of them, so each of these has K-1 predictions.

    With `difficulty_flatten` (not in the paper), Efficient MAE's loss and decoder masking apply to each part.
    A part then predicts the easiest `num_predicted` patches; all others and those beyond the threshold are
    excluded from both losses.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        options = recipe.method.emae
        self.encoder, self.decoder = build_encoder(recipe), build_decoder(recipe)
        self.num_parts, self.target = options.num_parts, build_target(recipe)
        self.consistency_weight = options.consistency_weight
        self.consistency_kind, self.consistency_mean = options.consistency_kind, options.consistency_mean
        flatten = options.difficulty_flatten
        self.difficulty_flatten = DifficultyFlatten.from_recipe(recipe) if flatten else None
        self.grid, self.patch_size = recipe.grid, recipe.model.patch_size
        self.noise_size = recipe.num_patches
        part_size = recipe.num_patches // options.num_parts
        self.num_decoded = max(1, round(options.decode_share * part_size))  # of each part, by each other part
        num_candidates = (options.num_parts - 1) * self.num_decoded
        self.num_predicted = min(recipe.num_predicted, num_candidates) if flatten else num_candidates
        self.drops_hardest = flatten and self.num_predicted < num_candidates

    def forward(self, images: torch.Tensor, noise: torch.Tensor) -> MethodOutput:
        """Return a MethodOutput with K parts, V = L/K, and M = (K-1) * num_decoded or num_predicted."""
        patches = self.patchify(images)
        parts = parallel_parts(noise, self.num_parts)  # (B, K, V)
        decoded_ids = parts[:, :, : self.num_decoded]  # patches of each part that the other parts predict
        predicted_ids = self._collect_other_parts(decoded_ids).flatten(2, 3)  # (B, K, M)
        flatten, distance, keep = self.difficulty_flatten, None, None
        if flatten:
            distance = flatten.compute_difficulty(parts.flatten(0, 1), self.grid)
            distance = distance.view(*parts.shape[:2], -1).gather(2, predicted_ids)
            if self.drops_hardest:
                easiest = select_easiest(distance, self.num_predicted)
                predicted_ids, distance = predicted_ids.gather(2, easiest), distance.gather(2, easiest)
            keep = flatten.keep_mask(distance, flatten.beta)

        prediction = self._predict(patches, parts, predicted_ids, keep)  # (B, K, M, D)
        if self.drops_hardest:
            target = self.make_targets(patches, predicted_ids)
        else:  # normalize each target once, not once per part that predicts it
            target = self._collect_other_parts(self.make_targets(patches, decoded_ids)).flatten(2, 3)
        error = patch_error(prediction, target)
        if flatten and distance is not None:
            part_keep = None if keep is None else keep.flatten(0, 1)
            reconstruction = difficulty_flatten_loss(
                error.flatten(0, 1), distance.flatten(0, 1), flatten.gamma, part_keep
            )
        else:
            reconstruction = error.flatten(1).mean(dim=1).mean()
        consistency = self._consistency(prediction, predicted_ids, keep)
        loss = reconstruction + self.consistency_weight * consistency
        metrics = {"reconstruction": reconstruction.detach(), "consistency": consistency.detach()}
        return MethodOutput(loss, prediction.detach(), target, parts, predicted_ids, metrics)

    @torch.no_grad()
    def reconstruct(self, images: torch.Tensor, noise: torch.Tensor) -> Reconstruction:
        patches = self.patchify(images)
        parts = parallel_parts(noise, self.num_parts)
        masked_ids = self._collect_other_parts(parts).flatten(2, 3)
        prediction = self._predict(patches, parts, masked_ids, keep=None)
        return self.make_reconstruction(patches, prediction, parts, masked_ids)

    def _collect_other_parts(self, values: torch.Tensor) -> torch.Tensor:
        """Stack for each part the values of the parts it predicts: (B, K, ...) -> (B, K, K-1, ...)."""
        return torch.stack([values.roll(-1 - s, dims=1) for s in range(self.num_parts - 1)], dim=2)

    def _predict(
        self, patches: torch.Tensor, parts: torch.Tensor, predicted_ids: torch.Tensor, keep: torch.Tensor | None
    ) -> torch.Tensor:
        """Predict the patches at predicted_ids (B, K, M) from each part (B, K, V) -> (B, K, M, D)."""
        batch, num_parts, num_visible = parts.shape
        views = batch * num_parts
        visible_ids = parts.reshape(views, num_visible)
        visible = gather_tokens(patches, parts.flatten(1)).view(views, num_visible, -1)
        encoded = self.encoder(visible, visible_ids)
        keep = None if keep is None else keep.reshape(views, -1)
        prediction = self.decoder(encoded, visible_ids, predicted_ids.reshape(views, -1), keep)
        return prediction.float().view(*predicted_ids.shape, -1)

    def _consistency(
        self, prediction: torch.Tensor, predicted_ids: torch.Tensor, keep: torch.Tensor | None
    ) -> torch.Tensor:
        """Compute `losses.self_consistency_loss`, directly on the packed layout if nothing is dropped.

        In that case every pair of parts shares equally many patches, so the mean over pairs of their means is
        one mean. With K = 2 no two parts predict the same patch, and the result is 0.
        """
        if keep is not None or self.drops_hardest:
            keep = torch.ones_like(predicted_ids, dtype=torch.bool) if keep is None else keep
            full = prediction.new_zeros(*prediction.shape[:2], self.noise_size, prediction.shape[3])
            full = full.scatter(2, predicted_ids[..., None].expand_as(prediction), prediction)
            predicted = keep.new_zeros(*keep.shape[:2], self.noise_size).scatter(2, predicted_ids, keep)
            return self_consistency_loss(full, predicted, self.consistency_kind, self.consistency_mean)
        # Element s of part k predicts part k + 1 + s. Roll back so that index k of every list entry is part k
        # as predicted by part k - 1 - s.
        by_offset = prediction.unflatten(2, (self.num_parts - 1, self.num_decoded))
        aligned = [by_offset[:, :, s].roll(1 + s, dims=1) for s in range(self.num_parts - 1)]
        pairs = list(combinations(aligned, 2))
        total = prediction.new_zeros(())
        for first, second in pairs:
            total = total + disagreement(first, second, self.consistency_kind).mean()
        if self.consistency_mean == "all":
            total = total * ((self.num_parts - 2) * self.num_decoded / self.noise_size)
        return total / max(len(pairs), 1)
