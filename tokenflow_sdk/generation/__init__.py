"""Text to image: `Generator`, its scheduler, and the next-scale loop."""
