"""Self-attention over the pixels of a map (the encoder of arXiv 2010.11929, sec. 3.1, without its norms)."""

from __future__ import annotations

from torch import Tensor, nn

from models.common import Conv, PartialBlock


class TransformerLayer(nn.Module):
    """Attention and two linear maps, each with a shortcut. tokens (L, B, c) -> (L, B, c)."""

    def __init__(self, c: int, num_heads: int) -> None:
        super().__init__()
        self.q = nn.Linear(c, c, bias=False)
        self.k = nn.Linear(c, c, bias=False)
        self.v = nn.Linear(c, c, bias=False)
        self.ma = nn.MultiheadAttention(c, num_heads)
        self.fc1 = nn.Linear(c, c, bias=False)
        self.fc2 = nn.Linear(c, c, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.ma(self.q(x), self.k(x), self.v(x), need_weights=False)[0] + x
        return self.fc2(self.fc1(x)) + x


class TransformerBlock(nn.Module):
    """(B, c1, H, W) -> (B, c2, H, W) through ``num_layers`` TransformerLayers over H*W tokens; position is learned by
    ``linear``. c2 must be a multiple of ``num_heads``."""

    def __init__(self, c1, c2, num_heads: int, num_layers: int, *, act: bool | nn.Module = True) -> None:
        super().__init__()
        self.conv = Conv(c1, c2, act=act) if c1 != c2 else None
        self.linear = nn.Linear(c2, c2)
        self.tr = nn.Sequential(*(TransformerLayer(c2, num_heads) for _ in range(num_layers)))

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.conv is None else self.conv(x)
        b, c, h, w = x.shape
        tokens = x.flatten(2).permute(2, 0, 1)  # (h*w, b, c)
        tokens = self.tr(tokens + self.linear(tokens))
        return tokens.permute(1, 2, 0).reshape(b, c, h, w)


class C3TR(PartialBlock):
    """PartialBlock around one TransformerBlock of n layers, 4 heads; shortcut and g are accepted for the order."""

    def __init__(self, c1, c2, n=1, shortcut=True, g=1, e=0.5, *, act: bool | nn.Module = True) -> None:
        super().__init__(c1, c2, e, act, lambda h: TransformerBlock(h, h, 4, n, act=act))
