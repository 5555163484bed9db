"""Images: listing, decoding, augmentation, preprocessing, sampling, loading, and the bundled demo set."""
