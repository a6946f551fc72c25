"""ScreenSpot-v2 and ScreenSpot-Pro: find an element on one screenshot (arXiv 2410.23218, 2504.07981)."""
