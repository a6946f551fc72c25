"""What `mmkv look` does: which vision tokens a method kept, merged and dropped, drawn over the frames."""
