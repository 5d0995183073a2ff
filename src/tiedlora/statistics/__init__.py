"""Intervals, and plans that are computed from them: numbers in, numbers out.

This package has estimates with their intervals (over examples, over seeds, over both), the bootstrap, the coverage of
these intervals, and the number of seeds and rows that a comparison needs. It imports numpy and scipy, and no other
package of tiedlora. It knows no run, no task and no table.
"""
