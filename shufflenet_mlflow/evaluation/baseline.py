"""The accuracy of always answering with the largest class, beside which accuracies are shown."""


def beside_majority(accuracy: float, majority: float | None) -> str:
    """Return an accuracy as text, with the share of the largest class where that is known."""
    return f"{accuracy:.4f}" + ("" if majority is None else f" (majority {majority:.4f})")
