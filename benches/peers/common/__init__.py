"""What the peers in Python share: the protocol of ../README.md, random weights, a check."""
