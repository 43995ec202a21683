"""Products whose weight is a vector of kept values and lists of where they are."""
