"""Firmware of int8 students for Arm microcontrollers: C, one static arena, an image linked to the device's memory."""
