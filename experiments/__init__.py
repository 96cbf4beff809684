"""The measurements behind the README and the chapters: studies, the testbeds that they run on, and their
results.
"""
