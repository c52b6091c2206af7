"""ReLIFT: fine-tuning on the hardest questions between steps of reinforcement learning (arXiv 2506.07527)."""
