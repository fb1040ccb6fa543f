"""A training script as in a fork: a model finds the square in a noisy picture. Saccade is not mentioned."""

import time

import torch
from ops import MSDeformAttn
from torch import nn

SIZE = 64


def pictures(count, generator):
    """Noise with a bright square of 9 pixels in it, and the square's centre (0 … 1)."""
    centres = torch.randint(8, SIZE - 8, (count, 2), generator=generator)
    noisy = 0.5 * torch.randn(count, 1, SIZE, SIZE, generator=generator)
    for picture, (x, y) in zip(noisy, centres.tolist(), strict=True):
        picture[:, y - 4 : y + 5, x - 4 : x + 5] += 1
    return noisy, (centres + 0.5) / SIZE


class Finder(nn.Module):
    """Two levels of features, one query that looks at them twice."""

    def __init__(self, width=32):
        super().__init__()
        self.fine = nn.Sequential(nn.Conv2d(1, width, 7, 4, 3), nn.ReLU())
        self.coarse = nn.Sequential(nn.Conv2d(width, width, 5, 4, 2), nn.ReLU())
        self.query = nn.Parameter(torch.randn(1, 8, width))
        self.layers = nn.ModuleList(MSDeformAttn(width, n_levels=2, n_heads=4) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.steps = nn.ModuleList(nn.Linear(width, 2) for _ in range(2))

    def forward(self, picture):
        """The centre of the square, [N, 2]."""
        fine = self.fine(picture)
        levels = [fine, self.coarse(fine)]
        shapes = torch.tensor([level.shape[-2:] for level in levels], device=picture.device)
        starts = torch.cat([shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]])
        flat = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], 1)
        query = self.query.expand(len(picture), -1, -1)
        position = picture.new_zeros(*query.shape[:2], 2)  # before the sigmoid: the middle
        for layer, norm, step in zip(self.layers, self.norms, self.steps, strict=True):
            reference = position.sigmoid()[:, :, None].expand(-1, -1, len(levels), -1)
            query = norm(query + layer(query, reference, flat, shapes, starts))
            position = position + step(query)
        return position.mean(1).sigmoid()


def main():
    """Trains for 300 steps."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = Finder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    begin = time.perf_counter()
    for step in range(1, 301):
        picture, centre = pictures(16, generator)
        distance = (model(picture) - centre).norm(dim=-1).mean()
        optimizer.zero_grad()
        distance.backward()
        optimizer.step()
        if step in (1, 100, 200, 300):
            print(f"step {step}: {SIZE * distance.item():.1f} pixels from the centre")
    print(f"{time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
