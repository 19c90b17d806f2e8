"""LoMaR: "Efficient Self-supervised Vision Pretraining with Local Masked Reconstruction", Chen et al.

https://arxiv.org/abs/2206.00790. Small windows of an image are each masked and reconstructed by themselves:
mask tokens go through the encoder, positions are relative (iRPE), and one linear layer is the head. Settings
and details that the paper leaves open are those of its code, github.com/junchen14/LoMaR, with one difference:
there a batch shares its windows, here every image draws its own.
"""

import torch
from torch import nn

from pipeline.losses import difficulty_flatten_loss, patch_error
from pipeline.masking import draw_windows, gather_tokens, random_split, tile_windows
from pipeline.methods.efficient_mae import DifficultyFlatten
from pipeline.methods.method import Method, MethodOutput, Reconstruction
from pipeline.models.encoder import initialize_like_mae
from pipeline.models.window_encoder import WindowEncoder


class LoMaR(Method):
    """`num_windows` windows an image, `num_visible` patches seen in each. `grid`: patches along an image's
    side.

    `flattening`: weigh the errors by Efficient MAE's difficulty inside each window; None, as in the paper:
    all alike.
    """

    def __init__(
        self,
        encoder: WindowEncoder,
        *,
        grid: int,
        num_windows: int,
        num_visible: int,
        flattening: DifficultyFlatten | None,
        normalize_targets: bool,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.grid, self.window = grid, encoder.window
        self.num_windows, self.num_visible = num_windows, num_visible
        self.flattening, self.normalize_targets = flattening, normalize_targets
        self.patch_size = encoder.patch_size
        self.pred = nn.Linear(encoder.norm.normalized_shape[0], self.patch_size**2 * 3)
        initialize_like_mae(self.pred)
        self.places = grid - self.window + 1  # of a window along one side
        self.noise_size = 2 * self.places + num_windows * self.window**2

    def forward(self, images: torch.Tensor, noise: torch.Tensor) -> MethodOutput:
        """MethodOutput with K = num_windows; its ids are positions in the image."""
        place_noise, mask_noise = noise[:, : 2 * self.places], noise[:, 2 * self.places :]
        windows = draw_windows(place_noise, self.grid, self.window, self.num_windows)  # (B, K, window^2)
        patches = self.patches(images)
        prediction, visible, masked = self._predict(patches, windows, mask_noise)
        visible_ids, predicted_ids = windows.gather(2, visible), windows.gather(2, masked)
        target = self.targets(gather_tokens(patches, predicted_ids.flatten(1))).view(prediction.shape)
        error = patch_error(prediction, target)  # (B, K, M)
        reconstruction = error.flatten(1).mean(dim=1).mean()
        loss = reconstruction
        if self.flattening:
            distance = self.flattening.difficulty(visible.flatten(0, 1), self.window)
            distance = distance.gather(1, masked.flatten(0, 1))
            loss = difficulty_flatten_loss(error.flatten(0, 1), distance, self.flattening.gamma)
        metrics = {"reconstruction": reconstruction.detach()}
        return MethodOutput(loss, prediction.detach(), target, visible_ids, predicted_ids, metrics)

    def tokens(self, images: torch.Tensor) -> torch.Tensor:
        """As every method's; the whole image is one large window."""
        patches = self.patches(images)
        ids = torch.arange(patches.shape[1], device=images.device).expand(patches.shape[:2])
        return self.encoder(patches, ids, patches.shape[1])

    @torch.no_grad()
    def reconstruct(self, images: torch.Tensor, noise: torch.Tensor) -> Reconstruction:
        """One view (K = 1) of windows that tile the whole image; where the last ones overlap, one of them is
        shown."""
        patches = self.patches(images)
        windows = tile_windows(self.grid, self.window, images.device).expand(len(images), -1, -1)
        mask_noise = noise[:, 2 * self.places :]
        wanted = windows.shape[1] * self.window**2
        mask_noise = mask_noise.repeat(1, -(-wanted // mask_noise.shape[1]))[:, :wanted]
        prediction, visible, masked = self._predict(patches, windows, mask_noise)
        views = (
            x.flatten(1, 2)[:, None]
            for x in (prediction, windows.gather(2, visible), windows.gather(2, masked))
        )
        return self.picture(patches, *views)

    def _predict(
        self, patches: torch.Tensor, windows: torch.Tensor, mask_noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """-> prediction (B, K, M, P*P*3), and the places inside their windows of what was seen and what was
        not."""
        batch, count, size = windows.shape
        visible, masked = random_split(mask_noise.reshape(batch * count, size), self.num_visible)
        visible_ids = windows.gather(2, visible.view(batch, count, -1))
        seen = gather_tokens(patches, visible_ids.flatten(1)).view(batch * count, self.num_visible, -1)
        encoded = self.encoder(seen, visible)
        prediction = self.pred(gather_tokens(encoded, masked + 1)).float()  # + 1: the class token
        return tuple(x.view(batch, count, *x.shape[1:]) for x in (prediction, visible, masked))
