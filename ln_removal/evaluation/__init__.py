"""Scoring: cross-entropy on a token split, four-way multiple choice, and the results file that holds both."""
