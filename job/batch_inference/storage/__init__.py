"""Stores: URIs, requests to S3, Google, Azure and local disks, retries, and what failures mean.

Nothing here reads or writes the content of images, manifests or commits.
"""
