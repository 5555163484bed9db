"""Look at folders of images for what spoils a training or its figures."""
