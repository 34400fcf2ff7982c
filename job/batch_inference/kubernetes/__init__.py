"""Everything specific to Kubernetes or to Ray's job server: capacity, schedules, the submitter, pod hooks and presets.

It needs no other wing, so that the submitter's pod starts without Ray or torch.
"""
