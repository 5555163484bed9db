"""The networks of the ShuffleNet series: their catalog, building blocks and specs, and loading from checkpoints."""
