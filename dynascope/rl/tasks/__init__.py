"""Tasks whose answers can be checked, rewards for them, how hard they are, and base models taught them."""
