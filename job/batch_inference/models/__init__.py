"""Models and predictors: loading them, describing them, and running batches of images on a device.

Nothing here imports Ray; actors are in `pipeline`.
"""
