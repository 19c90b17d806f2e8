"""LoMaR: "Local Masked Reconstruction for Efficient Self-Supervised Learning on High-Resolution Images", Chen et
al., WACV 2025, pp. 8035-8045.

https://arxiv.org/abs/2206.00790. Small windows of an image are masked and reconstructed independently: mask
tokens pass through the encoder, positions are relative (iRPE), and the head is one linear layer. Settings
that the paper leaves open are those of its code, github.com/junchen14/LoMaR, with one difference: every image
draws its own windows, as in the paper's Figure 2. In the code, the images of a batch share K windows, and if K
divides the batch, an image has one window, masked K times. `windows: as_released` does the same.

With tokens as target (recipe vitb16_lomar_beit), it is LoMaR inside BEiT.

With `decoder`, MAE's encoder sees the visible patches of a window, at their positions in the image, and MAE's
decoder predicts the others, the architecture that the paper's Figure 4 compares with.
"""

import torch
from torch import nn

from pipeline.losses import difficulty_flatten_loss
from pipeline.masking import draw_windows, gather_tokens, pair_windows_as_released, random_split, tile_windows
from pipeline.methods.backbone import build_decoder, build_encoder
from pipeline.methods.efficient_mae import DifficultyFlatten
from pipeline.methods.method import Method, MethodOutput, Reconstruction
from pipeline.methods.registry import register_method
from pipeline.methods.targets import build_target
from pipeline.models.encoder import init_weights_mae
from pipeline.models.window_encoder import WindowEncoder
from pipeline.recipe import Recipe


@register_method("lomar")
class LoMaR(Method):
    """Predict the masked patches of K random windows of an image.

    With `difficulty_flatten` (not in the paper), errors are weighted by Efficient MAE's difficulty inside
    each window.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        options = recipe.method.lomar
        self.target = build_target(recipe)
        self.has_decoder, self.shares_windows = options.decoder, options.windows == "as_released"
        if self.has_decoder:
            self.encoder, self.decoder = build_encoder(recipe), build_decoder(recipe, num_outputs=self.target.width)
        else:
            self.encoder = WindowEncoder(
                window_size=options.window_size,
                patch_size=recipe.model.patch_size,
                **recipe.model.size._asdict(),
                activation_checkpointing=recipe.engine.activation_checkpointing,
            )
        self.grid, self.patch_size = recipe.grid, recipe.model.patch_size
        self.num_windows, self.window_size = options.num_windows, options.window_size
        self.num_visible = recipe.num_visible
        flatten = options.difficulty_flatten
        self.difficulty_flatten = DifficultyFlatten.from_recipe(recipe) if flatten else None
        if not self.has_decoder:
            self.pred = nn.Linear(recipe.model.size.width, self.target.width)
            init_weights_mae(self.pred)
        self.position_noise_size = 2 * (self.grid - self.window_size + 1)
        self.noise_size = self.position_noise_size + self.num_windows * self.window_size**2

    def forward(self, images: torch.Tensor, noise: torch.Tensor) -> MethodOutput:
        """Return a MethodOutput with K = num_windows; ids are positions in the image."""
        position_noise = noise[:, : self.position_noise_size]
        mask_noise = noise[:, self.position_noise_size :]
        windows = draw_windows(position_noise, self.grid, self.window_size, self.num_windows)
        if self.shares_windows:
            windows = pair_windows_as_released(windows[0], len(images))
        patches = self.patchify(images)
        prediction, visible, masked = self._predict(patches, windows, mask_noise)
        visible_ids, predicted_ids = windows.gather(2, visible), windows.gather(2, masked)
        target = self.make_targets(patches, predicted_ids)
        error = self.target.error(prediction, target)  # (B, K, M)
        reconstruction = error.flatten(1).mean(dim=1).mean()
        loss = reconstruction
        if self.difficulty_flatten:
            distance = self.difficulty_flatten.compute_difficulty(visible.flatten(0, 1), self.window_size)
            distance = distance.gather(1, masked.flatten(0, 1))
            loss = difficulty_flatten_loss(error.flatten(0, 1), distance, self.difficulty_flatten.gamma)
        metrics = {"reconstruction": reconstruction.detach()}
        return MethodOutput(loss, prediction.detach(), target, visible_ids, predicted_ids, metrics)

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """Encode unmasked images as one large window: (B, 3, H, W) -> (B, 1 + L, D), class token first."""
        if self.has_decoder:
            return super().forward_features(images)
        patches = self.patchify(images)
        return self.encoder(patches, self.all_ids(patches), patches.shape[1])

    @torch.no_grad()
    def reconstruct(self, images: torch.Tensor, noise: torch.Tensor) -> Reconstruction:
        """Reconstruct in one view (K = 1) with windows that tile the image. A patch in several windows takes
        the prediction of one of them."""
        patches = self.patchify(images)
        windows = tile_windows(self.grid, self.window_size, images.device).expand(len(images), -1, -1)
        mask_noise = noise[:, self.position_noise_size :]
        noise_needed = windows.shape[1] * self.window_size**2
        mask_noise = mask_noise.repeat(1, -(-noise_needed // mask_noise.shape[1]))[:, :noise_needed]
        prediction, visible, masked = self._predict(patches, windows, mask_noise)
        ids = (windows.gather(2, visible), windows.gather(2, masked))
        view = (x.flatten(1, 2)[:, None] for x in (prediction, *ids))
        return self.make_reconstruction(patches, *view)

    def _predict(
        self, patches: torch.Tensor, windows: torch.Tensor, mask_noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Predict the masked patches of windows (B, K, window_size^2).

        Returns:
            Prediction (B, K, M, W), and the positions inside the window of its visible (B, K, V) and its
            masked patches (B, K, M).
        """
        batch, num_windows, size = windows.shape
        visible, masked = random_split(mask_noise.reshape(batch * num_windows, size), self.num_visible)
        visible_ids = windows.gather(2, visible.view(batch, num_windows, -1))
        visible_patches = gather_tokens(patches, visible_ids.flatten(1))
        visible_patches = visible_patches.view(batch * num_windows, self.num_visible, -1)
        if self.has_decoder:
            masked_ids = windows.gather(2, masked.view(batch, num_windows, -1)).flatten(0, 1)
            encoded = self.encoder(visible_patches, visible_ids.flatten(0, 1))
            prediction = self.decoder(encoded, visible_ids.flatten(0, 1), masked_ids).float()
        else:
            encoded = self.encoder(visible_patches, visible)
            prediction = self.pred(gather_tokens(encoded, masked + 1)).float()  # + 1: the class token
        return (
            prediction.unflatten(0, (batch, num_windows)),
            visible.unflatten(0, (batch, num_windows)),
            masked.unflatten(0, (batch, num_windows)),
        )
