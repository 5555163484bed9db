"""Options of training that are tested together: each of them has to resume bit for bit."""

GROUPS: dict[str, tuple[object, ...]] = {
    "modern": (
        *("--recipe", "modern", "--warmup-epochs", 0.75, "--augment", "trivial", "--erasing", 0.5, "--mixup", 0.2),
        *("--cutmix", 1, "--clip-norm", 0.5, "--ema-decay", 0.9),
    ),
    "finetune": (
        *("--recipe", "finetune", "--lr", 0.02, "--freeze", 1, "--head-lr-factor", 10, "--layer-decay", 0.7),
        *("--schedule", "constant", "--augment", "rand", "--amp", "bf16"),
    ),
    "sampler": ("--balance", "sampler", "--schedule", "cosine", "--mixup", 1, "--micro-batch-size", 4),
    "weights": ("--balance", "weights", "--optimizer", "adamw", "--lr", 0.001, "--cutmix", 1, "--amp", "fp16"),
}
"""Name -> options besides those of a small training."""
