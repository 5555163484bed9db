"""A pass over a data set, its report and plots, and prediction."""
