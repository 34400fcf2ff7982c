"""Texts that try to break out of a page."""

from __future__ import annotations

HOSTILE = [
    "s3://b/<script>alert(1)</script>.jpg",
    "javascript:alert(1)",
    'file:///x" onerror="alert(1)" y=".jpg',
    "s3://b/'><img src=//evil.example/x.png>.jpg",
    "s3://b/]]></style></svg><iframe src=//evil.example>.jpg",
    "s3://b/{{ 7*7 }}{% raw %}.jpg",
    "s3://b/right-to-left-\u202egpj.exe",
    "s3://b/\x1b[2J\x00.jpg",
    "https://user:hunter2@evil.example/a.jpg?X-Amz-Signature=deadbeef",
    "s3://b/" + "long/" * 2000 + "x.jpg",
    "",
]
