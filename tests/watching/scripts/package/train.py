"""A script with its own flags, a sibling module and a module of relative imports, that ends with its own status."""

import argparse
import sys

import parts.model
import torch

parser = argparse.ArgumentParser()
parser.add_argument("output")
parser.add_argument("--steps", type=int, required=True)
parser.add_argument("--every", type=int, default=0, help="has the same name as one of the launcher's flags")
args = parser.parse_args()
torch.manual_seed(0)
model = parts.model.make()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(args.steps):
    optimizer.zero_grad()
    model(torch.randn(5, 3)).square().mean().backward()
    optimizer.step()
torch.save({"weights": model.state_dict(), "argv": sys.argv[1:], "every": args.every}, args.output)
sys.exit(7)
