"""For comparison: one network split over several devices, by channels or by rows."""
