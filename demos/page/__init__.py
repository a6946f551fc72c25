"""`mmkv demo`: a page in the browser over `mmkv.streaming`: watch a video, ask about it at any time."""
