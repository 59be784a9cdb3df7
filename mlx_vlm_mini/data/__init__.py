"""Data files of conversations, and generated scenes with questions: for training, calibration and checks."""
