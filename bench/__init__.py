"""Time per round of fedgrad, of stock Flower and of no framework at all, side by side."""
