"""Image folders, preprocessing, the order of samples, and the bundled demo set."""
