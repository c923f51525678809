"""The rival: one network split over many devices, by channels or by rows."""
