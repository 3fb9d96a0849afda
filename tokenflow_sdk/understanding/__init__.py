"""Questions about images: `Understander` and `Chat`, their scheduler, and the next-token loop."""
