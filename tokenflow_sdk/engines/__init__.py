"""TensorRT engines: what to build, building, caching and certifying them, and choosing the backend that runs a bundle."""
