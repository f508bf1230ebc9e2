"""Measures: time, memory and accuracy of the loss beside other implementations."""
