"""The fine-tuning loss and its bookkeeping against the usual way: `python benchmarks/relift.py`.

The usual way works out log-probabilities, probabilities and entropy as tensors of the logits' size and lets autograd keep
them. Peak memory is what the process gained at most, in a process of its own for each.
"""

import argparse
import multiprocessing
import resource
import sys

import torch
from interleaved import medians, tell

from dynascope.losses.demonstrations import interleaved_sft_loss, sft_loss_from_hidden
from dynascope.rl.interleaving.hardest import Entry, HardestQuestionBuffer, hardest_questions


def usual(logits: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    log_probs = logits.float().log_softmax(-1)
    nll = -log_probs.gather(-1, labels[..., None])[..., 0]
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return ((nll - 1e-4 * entropy) * mask).sum() / mask.sum()


def inputs(options: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    shape = options.sequences, options.length
    hidden = torch.randn(*shape, options.width, requires_grad=True)
    unembedding = (0.02 * torch.randn(options.vocabulary, options.width)).requires_grad_()
    return hidden, unembedding, torch.randint(options.vocabulary, shape), torch.ones(shape)


def ways(options: argparse.Namespace) -> dict[str, object]:
    hidden, unembedding, labels, mask = inputs(options)

    def step(loss: torch.Tensor) -> torch.Tensor:
        hidden.grad = unembedding.grad = None
        loss.backward()
        return hidden.grad.clone()

    return {
        "from hidden states, in chunks": lambda: step(
            sft_loss_from_hidden(hidden, unembedding, labels, mask, chunk=256).loss
        ),
        "from logits": lambda: step(interleaved_sft_loss(hidden @ unembedding.T, labels, mask).loss),
        "the usual way": lambda: step(usual(hidden @ unembedding.T, labels, mask)),
    }


def peak(name: str, options: argparse.Namespace, told: object) -> None:
    torch.set_num_threads(1)
    tiny = argparse.Namespace(sequences=1, length=8, width=options.width, vocabulary=100)
    ways(tiny)[name]()  # what torch loads at its first backward pass is no part of it
    way = ways(options)[name]
    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    way()
    told.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit / 2**20)


WAYS = ("from hidden states, in chunks", "from logits", "the usual way")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=3, help="0 measures memory only")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    options = parser.parse_args()
    # Before anything large is made here: a process begins with the peak of the one that started it.
    context = multiprocessing.get_context("spawn")
    print("peak memory gained")
    for name in WAYS:
        told = context.Queue()
        process = context.Process(target=peak, args=(name, options, told))
        process.start()
        print(f"{name:46} {told.get():10.0f} MiB")
        process.join()
    if not options.turns:
        return
    torch.set_num_threads(1)
    each = ways(options)
    first = each["the usual way"]()
    for name in ("from hidden states, in chunks", "from logits"):
        difference = (each[name]() - first).abs().max() / first.abs().max()
        print(f"{name}: relative difference of gradients {float(difference):.1e}")
    print(f"\nloss and backward, {options.sequences} x {options.length} tokens, vocabulary {options.vocabulary}")
    tell(medians(each, options.turns), "the usual way")
    print("\nbookkeeping of 128 prompts x 8 samples")
    correct, questions = torch.rand(128, 8) < 0.05, [str(number) for number in range(128)]

    def keep_books() -> None:
        buffer = HardestQuestionBuffer(64, max_size=512)
        buffer.put([Entry(one) for one in hardest_questions(questions, correct.float().mean(1))])
        if buffer.ready():
            buffer.pop()

    tell(medians({"buffer": keep_books}, options.turns), "buffer")


if __name__ == "__main__":
    main()
