"""Trains a small GPT on real text with plain PyTorch.

Without --text it reads the Python standard library's own sources and documentation strings, which every machine has.

    python examples/train_gpt.py --steps 400
"""

import argparse
import math
import pathlib
import sysconfig
import time

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        heads = self.qkv(self.norm1(x)).view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self, vocabulary: int, context: int, width: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, num_heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                is_residual = name.endswith(("out.weight", "mlp.2.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * depth) if is_residual else 0.02)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.token(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def read_text(path: str | None, size: int) -> bytes:
    if path is not None:
        return pathlib.Path(path).read_bytes()
    library = pathlib.Path(sysconfig.get_paths()["stdlib"])
    text = bytearray()
    for source in sorted(library.glob("*.py")):
        text += source.read_bytes()
        if len(text) >= size:
            break
    return bytes(text[:size])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", help="a text file to train on (default: the standard library's sources)")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = torch.frombuffer(bytearray(read_text(args.text, 2_000_000)), dtype=torch.uint8).long()
    split = int(0.9 * len(data))
    parts = {"train": data[:split], "val": data[split:]}

    def batch(part: str) -> tuple[torch.Tensor, torch.Tensor]:
        text = parts[part]
        starts = torch.randint(len(text) - args.context - 1, (args.batch_size,))
        rows = torch.stack([text[start : start + args.context + 1] for start in starts]).to(device)
        return rows[:, :-1], rows[:, 1:]

    model = GPT(256, args.context, args.width, args.depth, args.heads).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / args.warmup, 0.55 + 0.45 * math.cos(math.pi * step / args.steps)),
    )
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(data):,} bytes of text, {device}")

    started = time.perf_counter()
    for step in range(args.steps):
        model.train()
        _, loss = model(*batch("train"))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 50 == 0 or step == 0:
            model.eval()
            with torch.no_grad():
                val = sum(model(*batch("val"))[1].item() for _ in range(8)) / 8
            speed = (step + 1) / (time.perf_counter() - started)
            print(f"step {step + 1:4d}  train {loss.item():.3f}  val {val:.3f}  {speed:.1f} steps/s", flush=True)


if __name__ == "__main__":
    main()
