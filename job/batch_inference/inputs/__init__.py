"""Find the inputs of a job and read them: listing, manifest files, tar and Parquet members, coalesced reads.

The frozen manifest lives in `output`, the client for single objects in `storage`.
"""
