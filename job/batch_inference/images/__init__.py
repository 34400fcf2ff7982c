"""From the bytes of a file to pixels: decoding, damage, resizing, and the sandbox that decoders run in.

Nothing here knows of Ray or stores, and no module imports torch when it is loaded.
"""
