"""Classifiers: a model file holds one of these with its class table, pattern and grid."""
