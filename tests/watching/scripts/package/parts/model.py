from torch import nn

from .size import WIDTH


def make() -> nn.Module:
    return nn.Sequential(nn.Linear(3, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1))
