"""Drafters: S3D and the baselines it is compared with."""
