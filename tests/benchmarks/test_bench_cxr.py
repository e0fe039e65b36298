"""The eight released chest X-ray networks on 32 radiographs, against the reference's way of using them.

Both ways have the same random weights in files of the released layouts, run in the same process on the same threads and
give the same scores; the figures are ratios of one run. Run with ``make bench``; they go to the docs with date and machine.
"""
