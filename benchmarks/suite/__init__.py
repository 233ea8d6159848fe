"""asv suite: times of our side of each case; the cases themselves are in organfast/bench.py."""
